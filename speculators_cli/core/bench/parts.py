"""The parts of a timed step: samples, draft and loader, without the verifier's weights."""

import numpy as np
import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.bench.random_engine import build_engine
from speculators_cli.core.bench.synthetic import SyntheticLoader
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.sources import Request, open_samples
from speculators_cli.core.data.tokens import StatesShape
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.build import choose_compute_dtype, choose_kernels, load_batches
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import check_samples_fit, check_targets, fresh_config
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.optimizer_step import OptimizerStep
from speculators_cli.core.training.placement import place_weights
from speculators_cli.core.training.sharded_verifier import count_own_bytes
from speculators_cli.core.training.states import LiveStates, StateFiller, StoredStates
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.train import OptimizerSettings

ENDLESS = 2**31  # epochs


def read_samples(
    settings: BenchSettings, verifier: VerifierConfig, vocab_size: int, progress: Progress
) -> SampleSource | None:
    """The samples to train on; None for synthetic ones."""
    samples = settings.samples
    if not samples.data_path:
        return None
    wanted = Request(
        samples.data_path,
        data_format=samples.data_format,
        version=samples.data_format_version,
        index_file=None,
        max_bad_samples=None,
        alignment=ALGORITHMS[settings.shape.algorithm].alignment,
        capture="online" if settings.step.capture else "stored",
        live=StatesShape(verifier.hidden_size, _layer_ids(settings, verifier)),
    )
    source = open_samples(wanted, progress)
    check_samples_fit(source, verifier, vocab_size)
    check_targets(source, settings.step.total_seq_len, samples.data_path[0])
    return source


def _layer_ids(settings: BenchSettings, verifier: VerifierConfig) -> tuple[int, ...]:
    num_aux_layers = ALGORITHMS[settings.shape.algorithm].num_aux_layers
    return default_layer_ids(verifier.num_layers, num_aux_layers)


def build_step(
    settings: BenchSettings, verifier: VerifierConfig, vocab_size: int, ranks: Ranks
) -> tuple[DraftConfig, OptimizerStep]:
    """The step as `train` builds it, with random tensors in place of the verifier's."""
    shape, step, seed = settings.shape, settings.step, settings.measure.seed
    vocab_map = VocabMap.full(vocab_size)
    if not shape.full_vocab:
        counts = np.random.default_rng(seed).permutation(vocab_size)
        vocab_map = VocabMap.choose(counts, min(shape.draft_vocab_size, vocab_size))
    config = fresh_config(
        shape.algorithm,
        settings.algorithm_settings,
        verifier,
        vocab_map,
        LayerIds(_layer_ids(settings, verifier), is_assumed=True),
        arch=shape.draft_arch,
        num_layers=shape.num_layers,
    )
    dtype = choose_compute_dtype(step.compute_dtype, ranks.device)
    filler: StateFiller = StoredStates()
    if step.capture:
        engine = build_engine(
            verifier,
            vocab_size,
            config.target_layer_ids,
            dtype=dtype,
            device=ranks.device,
            is_float8=step.captures_in_float8,
        )
        frozen = _frozen_parts(engine, verifier)
        filler = LiveStates(engine, weights_bytes=count_own_bytes(engine.model))
    else:
        frozen = _random_verifier(verifier, vocab_size, ranks.device, seed)
    own = settings.algorithm_settings
    kernels = choose_kernels(step.kernels, step.gemm_dtype, dtype, config, own, ranks.device)
    draft = ALGORITHMS[shape.algorithm].build(
        config, frozen, vocab_map, own, use_fast_kernels=kernels.are_fast, seed=seed
    )
    if not step.capture and not vocab_map.is_full:
        frozen.rest_head()
    draft.use_float8 = kernels.in_float8
    weights = place_weights(
        draft, ranks, step.sharding, dtype, num_accumulated=step.gradient_accumulation_steps
    )
    optimizer = Optimizer(weights, OptimizerSettings(), use_fast_kernels=draft.use_fast_kernels)
    built = OptimizerStep(
        weights, ranks, optimizer, compute_dtype=dtype, noise_std=step.noise_std, seed=seed,
        filler=filler,
    )  # fmt: skip
    return config, built


def build_loader(
    settings: BenchSettings,
    samples: SampleSource | None,
    config: DraftConfig,
    step: OptimizerStep,
    seed: int,
) -> BatchSource:
    """Endless batches of this rank: of samples, or synthetic ones with this seed."""
    per_step = settings.step.gradient_accumulation_steps
    if samples is not None:
        return load_batches(
            samples,
            step.ranks,
            total_seq_len=settings.step.total_seq_len,
            seed=settings.measure.seed,
            global_batch=per_step * step.ranks.num_ranks,
            num_epochs=ENDLESS,
            max_steps=None,
            num_workers=settings.samples.num_workers,
            prefetch_factor=settings.samples.prefetch_factor,
        )
    return SyntheticLoader(
        config,
        ALGORITHMS[config.algorithm].alignment,
        total_seq_len=settings.step.total_seq_len,
        supervised_fraction=settings.step.supervised_fraction,
        per_step=per_step,
        dtype=step.compute_dtype,
        pin_memory=step.ranks.device.type == "cuda",
        seed=seed,
        is_live=settings.step.capture,
        num_documents=settings.step.num_documents,
    )


def _frozen_parts(engine: TransformersEngine, verifier: VerifierConfig) -> FrozenVerifier:
    """What the draft reads of a random verifier, without a copy."""
    model = engine.model
    embedding = model.get_input_embeddings().weight.detach()
    head = model.get_output_embeddings().weight.detach()
    norm_weight = torch.ones(verifier.hidden_size, device=embedding.device)
    return FrozenVerifier(embedding, norm_weight, head, verifier)


def _random_verifier(
    config: VerifierConfig, vocab_size: int, device: torch.device, seed: int
) -> FrozenVerifier:
    generator = torch.Generator(device).manual_seed(seed)

    def weights() -> torch.Tensor:
        empty = torch.empty(vocab_size, config.hidden_size, dtype=torch.bfloat16, device=device)
        return empty.normal_(std=0.02, generator=generator)

    norm_weight = torch.ones(config.hidden_size, device=device)
    return FrozenVerifier(weights(), norm_weight, weights(), config)
