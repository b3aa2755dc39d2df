"""The whole verifier of a run with online capture: loaded, shared with the draft, checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.source import SampleSource, spread_evenly
from speculators_cli.core.data.state_cache import StateCache, engine_key
from speculators_cli.core.data.tokens import TokenFolder
from speculators_cli.core.engines.ahead_capturer import AheadCapturer
from speculators_cli.core.engines.devices import choose_dtype
from speculators_cli.core.engines.engine import Capturer, Packed
from speculators_cli.core.engines.host_states import Storage
from speculators_cli.core.engines.state_checks import check_head, check_layers
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model
from speculators_cli.core.errors import SettingsError, rewording
from speculators_cli.core.files import check_free_space, check_output_dir, find_existing
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.ahead import AheadLoader
from speculators_cli.core.training.cache_choice import choose_cache
from speculators_cli.core.training.cache_writer import CacheWriter
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.remote_vllm import open_vllm
from speculators_cli.core.training.sample_check import check_captured
from speculators_cli.core.training.sharded_verifier import count_own_bytes, shard_verifier
from speculators_cli.core.training.states import LiveStates
from speculators_cli.settings.capture import CaptureSettings
from speculators_cli.settings.train import TrainSettings

FLAGS = {"`--engine": "`--capture-engine"}  # as training calls the first
MAX_CHECKED_TOKENS = 2048
MAX_CHECKED_SAMPLES = 4


@dataclass(frozen=True)
class LiveVerifier:
    """The whole verifier, and its frozen parts that the draft reads."""

    engine: TransformersEngine | AheadCapturer
    frozen: FrozenVerifier
    fingerprint: Mapping[str, str]
    is_sharded: bool = False  # across ranks

    def fills(self, settings: CaptureSettings) -> LiveStates:
        """What computes the hidden states of batches."""
        writer = None
        if settings.cache_dir is not None:
            writer = CacheWriter(Storage(settings.cache_dtype, has_all_last_states=False))
        engine = self.engine
        if isinstance(engine, AheadCapturer):
            return LiveStates(engine, weights_bytes=0, writer=writer)
        return LiveStates(
            engine,
            weights_bytes=count_own_bytes(engine.model),
            writer=writer,
            join=engine.join if self.is_sharded else None,
        )

    def read_ahead(self, loader: BatchSource, samples: SampleSource) -> BatchSource:
        """Return a loader that requests hidden states ahead, where other processes compute them."""
        if isinstance(self.engine, AheadCapturer):
            return AheadLoader(loader, self.engine, samples)
        return loader

    def open_cache(self, settings: TrainSettings, inputs: Inputs) -> Inputs:
        """The inputs with samples whose hidden states are kept, if there is a cache.

        Raises:
            SettingsError: The folder cannot be written.
            MachineError: The disk has too little space.
        """
        given = settings.capture
        if given.cache_dir is None:
            return inputs
        check_output_dir(given.cache_dir, flag="--cache-dir")
        choice = choose_cache(settings, inputs, dtype=self.engine.dtype)
        cache = StateCache(
            given.cache_dir,
            engine_key(self.fingerprint, given.cache_dtype),
            choice.chosen,
            choice.states,
        )
        check_free_space(
            find_existing(given.cache_dir),
            choice.count_missing_bytes(cache, inputs, settings.data.total_seq_len),
            what="the cache of hidden states",
            hint="Pass a smaller `--cache-size`, or `--cache-dtype float8`",
        )
        return replace(
            inputs,
            samples=_cached(inputs.samples, cache),
            validation_samples=_cached(inputs.validation_samples, cache),
        )

    @rewording(FLAGS)
    def check(self, samples: SampleSource, progress: Progress) -> None:
        """Check the hidden states of the first samples, and that the LM head fits them.

        All ranks check the same samples.

        Raises:
            MachineError: They cannot be right.
        """
        packed = first_documents(samples)
        if packed is None:
            return
        states = self.engine.capture(packed)
        check_layers(states, self.engine.layer_ids)
        if isinstance(self.engine, TransformersEngine):
            check_head(packed, states, self.frozen, self.engine.logits)
        else:
            check_captured(packed, states, self.frozen, progress)


def _cached(samples: SampleSource, cache: StateCache) -> SampleSource:
    return replace(samples, cache=cache) if isinstance(samples, TokenFolder) else samples


@rewording(FLAGS)
def load_live_verifier(
    settings: TrainSettings, inputs: Inputs, frozen: FrozenVerifier, ranks: Ranks
) -> LiveVerifier:
    """Load the verifier onto the device of training.

    Args:
        settings: Of the run.
        inputs: Its verifier and layers.
        frozen: Embedding, final norm and LM head, on the CPU.
        ranks: Connected; all must call.

    Raises:
        SettingsError: transformers cannot load the verifier, its layers cannot be found, or it
            cannot be sharded.
        MachineError: It does not fit into memory.
    """
    if settings.capture.is_apart:
        return start_apart(settings, inputs, frozen, ranks)
    name, is_sharded = settings.draft.verifier_name_or_path, settings.capture.shard_verifier
    if is_sharded and ranks.num_local_ranks == 1:
        raise SettingsError(
            "`--shard-verifier` needs several ranks on a machine, but there is one",
            hint="Pass `--nproc-per-node` with the number of GPUs",
        )
    model = load_model(
        name,
        dtype=choose_dtype(settings.capture.capture_dtype, ranks.device),
        device=torch.device("cpu") if is_sharded else ranks.device,
        trust_remote_code=settings.draft.trust_remote_code,
        memory_hint="Shard it across GPUs with `--shard-verifier`, or store the hidden states with "
        "`speculators generate-data`",
    )
    model.requires_grad_(False)
    if is_sharded:
        shard_verifier(model, ranks, name)
    engine = TransformersEngine(
        model,
        inputs.layer_ids.ids,
        end_ids=frozenset(),
        name=name,
        packs_documents=True if is_sharded else None,  # as many passes on each rank
        is_float8=settings.capture.in_float8,
    )
    if is_sharded and not engine.is_packed:
        raise SettingsError(
            f"Verifier `{name}` cannot be sharded: its documents cannot be packed",
            hint="Leave out `--shard-verifier`, or store the hidden states with "
            "`speculators generate-data`",
        )
    return LiveVerifier(
        engine,
        share_weights(frozen, model).to(ranks.device),
        fingerprint_of(engine, engine.layer_ids, inputs.verifier_files),
        is_sharded,
    )


def fingerprint_of(
    engine: Capturer, layer_ids: Sequence[int], files: VerifierFiles
) -> dict[str, str]:
    """Everything that the hidden states of given tokens depend on."""
    return {
        **engine.fingerprint,
        "weights": files.hash_parts()[:16],
        "layer_ids": ",".join(map(str, layer_ids)),
    }


def start_apart(
    settings: TrainSettings, inputs: Inputs, frozen: FrozenVerifier, ranks: Ranks
) -> LiveVerifier:
    """Reach the vLLM of this machine, which is loaded with the first request.

    Raises:
        SettingsError: There are too few GPUs, or several machines.
        MachineError: vLLM is missing or too old.
    """
    dtype = choose_dtype(settings.capture.capture_dtype, ranks.device)
    engine = open_vllm(settings, inputs, ranks, dtype)
    fingerprint = fingerprint_of(engine, engine.layer_ids, inputs.verifier_files)
    return LiveVerifier(engine, frozen.to(ranks.device), fingerprint)


def share_weights(frozen: FrozenVerifier, model: Any) -> FrozenVerifier:
    """Return the frozen parts with the tensors of the whole model, where both are equal in bits.

    Embedding and LM head of an 8B verifier are 2 GB, which a second copy would take again.
    """
    embedding = _same(frozen.embedding, model.get_input_embeddings())
    head = embedding
    if frozen.head is not frozen.embedding:
        head = _same(frozen.head, model.get_output_embeddings())
    return FrozenVerifier(
        embedding,
        frozen.norm_weight,
        head,
        frozen.config,
        norm_bias=frozen.norm_bias,
        head_bias=frozen.head_bias,
    )


def _same(own: Tensor, module: Any) -> Tensor:
    weight = getattr(module, "weight", None)
    if weight is None or (weight.dtype, weight.shape) != (own.dtype, own.shape):
        return own
    weight = weight.detach()
    return weight if torch.equal(weight, own.to(weight.device)) else own


def first_documents(samples: SampleSource) -> Packed | None:
    """Some documents spread over the samples, with a few thousand tokens at most."""
    documents: list[tuple[Tensor, Tensor]] = []
    for ids, mask in _supervised_documents(samples):
        if documents and sum(len(x) for x, _ in documents) + len(ids) > MAX_CHECKED_TOKENS:
            break
        documents.append((ids, mask))
    if not documents:
        return None
    return pack_documents(documents)


def _supervised_documents(samples: SampleSource) -> Iterator[tuple[Tensor, Tensor]]:
    with_targets = [i for i, x in enumerate(samples.headers) if x.first_target >= 0]
    for index in spread_evenly(len(with_targets), MAX_CHECKED_SAMPLES):
        sample = samples.read(with_targets[index])
        yield sample.input_ids[:MAX_CHECKED_TOKENS], sample.loss_mask[:MAX_CHECKED_TOKENS]


def pack_documents(documents: Sequence[tuple[Tensor, Tensor]]) -> Packed:
    """Join documents of ids and masks end to end."""
    return Packed(
        torch.cat([ids for ids, _ in documents]),
        [len(ids) for ids, _ in documents],
        torch.cat([mask for _, mask in documents]).nonzero().flatten(),
    )
