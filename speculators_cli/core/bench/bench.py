"""bench(settings): time the training step of a draft, without the verifier's weights."""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.cost import Work, find_gpu
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.bench.profile import KernelTimes, profile_steps
from speculators_cli.core.bench.random_engine import build_engine
from speculators_cli.core.bench.shapes import find_shape
from speculators_cli.core.bench.stored_step import StoredStep
from speculators_cli.core.bench.synthetic import SyntheticLoader
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.disk_speed import DiskSpeed, measure_disk
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.sources import Request, open_samples
from speculators_cli.core.data.tokens import StatesShape
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.training.build import choose_compute_dtype, choose_kernels, load_batches
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.feed import DeviceFeed
from speculators_cli.core.training.inputs import check_samples_fit, check_targets, fresh_config
from speculators_cli.core.training.metrics import MetricSums
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.optimizer_step import OptimizerStep
from speculators_cli.core.training.run import out_of_memory_explained
from speculators_cli.core.training.sharded_verifier import count_own_bytes
from speculators_cli.core.training.states import LiveStates, StateFiller, StoredStates
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.train import OptimizerSettings

ENDLESS = 2**31  # epochs
NO_TIMEOUT = 1800  # seconds; unused, since there is only one rank
LEARNING_RATE = OptimizerSettings().lr


@dataclass(frozen=True)
class BenchReport:
    """The measurements; None means unknown, or not applicable on this device."""

    verifier: str
    device: str
    torch_version: str
    kernels: str  # `fast` or `plain`
    gemm_dtype: str  # of the draft's matrix products
    total_seq_len: int
    supervised_fraction: float
    ttt_steps: int  # number of trained draft tokens
    step_ms: float  # median
    step_ms_min: float
    step_ms_max: float
    tokens_per_second: float  # tokens of documents; padding is excluded
    first_step_seconds: float
    loss: float  # mean over all steps except the first
    peak_memory_bytes: int | None
    estimated_memory_bytes: int  # as `train --plan` estimates it for the fast kernels
    useful_tflop: float  # per step
    useful_tflops: float  # per second
    utilisation: float | None  # of the device's dense bfloat16 peak
    data_wait_share: float
    capture_ms: float | None  # per step, mean; None if hidden states are not computed
    capture_share: float | None  # of the time of steps
    disk: DiskSpeed | None  # of `--disk-dir`
    stored: tuple[StoredStep, ...]  # the step if hidden states were stored on that disk
    launch_ms: float | None  # host time per step, without the copy of the next batch
    idle_share: float | None  # fraction of the last profiled step without a running kernel
    split_ms: dict[str, float] | None  # by kind of kernel
    longest_kernels_ms: dict[str, float] | None  # by name, the longest per step
    num_kernels: int | None  # compute kernels launched per step

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def bench(settings: BenchSettings, *, progress: Progress = SILENT) -> BenchReport:
    """Run and time some training steps, as `train` runs them.

    Raises:
        SettingsError: The verifier cannot be used.
        DataError: The samples cannot be used, or are another verifier's.
        MachineError: The device is missing, or out of memory.
    """
    verifier, vocab_size = find_shape(settings.shape)
    step = settings.step
    with start_ranks(step.device, NO_TIMEOUT) as ranks:
        samples = _read_samples(settings, verifier, vocab_size, progress)
        with out_of_memory_explained(step.total_seq_len):
            config, optimizer_step = _build_step(settings, verifier, vocab_size, ranks)
            with closing(_build_loader(settings, samples, config, optimizer_step)) as loader:
                run = _Run(optimizer_step, loader)
                return _report(settings, run, verifier, *_measure(settings, run))


class _Run:
    """Optimizer steps over an endless stream of batches.

    Args:
        step: The step to time.
        loader: Source of the batches.
    """

    def __init__(self, step: OptimizerStep, loader: BatchSource) -> None:
        self.step = step
        self.device = step.ranks.device
        self.feed = DeviceFeed(self.device)
        self.batches = self.feed.steps(
            batches for epoch in count() for batches in loader.epoch(epoch)
        )
        self.sums = MetricSums.of(step.draft)
        self.masks: list[tuple[torch.Tensor, tuple[int, ...]]] = []
        step.draft.train()

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Add the sums of one batch."""
        self.sums.add(sums, batch)

    def add_broken(self, sample_ids: tuple[int, ...], is_broken: torch.Tensor) -> None:
        """Broken documents are skipped without a report."""

    def take(self) -> tuple[Batch, ...]:
        """The batches of the next step; their masks are kept."""
        ready = next(self.batches)
        self.masks.extend((batch.host_mask, batch.lengths) for batch in ready)
        return ready

    def train(self, ready: tuple[Batch, ...]) -> None:
        """Run one optimizer step, as `train` does."""
        self.step.run(ready, self, epoch=0, lr=LEARNING_RATE)

    def train_next(self) -> None:
        """Take batches and train on them."""
        self.train(self.take())


@dataclass(frozen=True)
class _Times:
    """The measured times."""

    step_ms: list[float]
    first_step_seconds: float
    wait_share: float
    capture_ms: float | None  # per step
    peak_memory_bytes: int | None
    masks: list[tuple[torch.Tensor, tuple[int, ...]]]  # loss mask and lengths of each sequence


def _measure(settings: BenchSettings, run: _Run) -> tuple[_Times, float | None, KernelTimes | None]:
    times = _time(run, settings)
    is_cuda = run.device.type == "cuda"
    launch_ms = _time_launch(run) if is_cuda else None
    kernels = profile_steps(run.train_next) if is_cuda and settings.measure.profile else None
    return times, launch_ms, kernels


def _time(run: _Run, settings: BenchSettings) -> _Times:
    """Time the first step, run the rest of the warmup, then time each step."""
    is_cuda = run.device.type == "cuda"
    clock = _Clock(run.device)
    run.train_next()
    first_step_seconds = clock.stop() / 1e3
    run.sums = MetricSums.of(run.step.draft)
    for _ in range(settings.measure.warmup_steps - 1):
        run.train_next()
    clock.stop()
    run.feed.take_wait_seconds()
    run.step.filler.take_seconds()
    run.masks.clear()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(run.device)
    for _ in range(settings.measure.steps):
        run.train_next()
        clock.tick()
    step_ms = clock.laps()
    captured = run.step.filler.take_seconds()
    return _Times(
        step_ms=step_ms,
        first_step_seconds=first_step_seconds,
        capture_ms=None if captured is None else captured * 1e3 / len(step_ms),
        wait_share=run.feed.take_wait_seconds() * 1e3 / sum(step_ms),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
        masks=list(run.masks),
    )


def _time_launch(run: _Run) -> float:
    """Milliseconds of the host to launch a step, while the GPU is idle."""
    times = []
    for _ in range(3):
        ready = run.take()
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        run.train(ready)
        times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times)


class _Clock:
    """Times steps without waiting for the device between them."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.started_at = time.perf_counter()
        self.marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        """End a lap, once the device reaches this point."""
        if self.is_cuda:
            self.marks.append(
                torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            )
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Milliseconds of each lap; waits for the device."""
        self.stop()
        if self.is_cuda:
            return [start.elapsed_time(stop) for start, stop in pairwise(self.marks)]
        return [(stop - start) * 1e3 for start, stop in pairwise(self.marks)]

    def stop(self) -> float:
        """Milliseconds since the start; waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - self.started_at) * 1e3


def _report(
    settings: BenchSettings,
    run: _Run,
    verifier: VerifierConfig,
    times: _Times,
    launch_ms: float | None,
    kernels: KernelTimes | None,
) -> BenchReport:
    draft, device = run.step.draft, run.device
    num_steps, own = settings.measure.steps, settings.algorithm_settings
    config = draft.config
    cost = ALGORITHMS[config.algorithm].cost
    work = [cost.count_work(config, own, mask, lengths) for mask, lengths in times.masks]
    num_tokens = sum(part.num_positions for part in work) / num_steps
    flops = sum(part.flops for part in work) / num_steps
    step_ms = statistics.median(times.step_ms)
    is_cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_name() if is_cuda else "cpu"
    gpu = find_gpu(device_name)
    per_second = flops / step_ms * 1e3
    disk = measure_disk(settings.step.disk_dir) if settings.step.disk_dir else None
    stored: tuple[StoredStep, ...] = ()
    if disk is not None and times.capture_ms is not None:
        num_targets = round(sum(part.num_targets for part in work) / num_steps)
        counts = (round(num_tokens), num_targets, config.num_aux_layers)
        stored = tuple(
            StoredStep.of(
                CaptureCost(verifier).count_stored_bytes(*counts, is_float8=is_float8),
                disk,
                step_ms=step_ms,
                capture_ms=times.capture_ms,
                is_float8=is_float8,
            )
            for is_float8 in (False, True)
        )
    return BenchReport(
        verifier=verifier.name_or_path,
        device=device_name,
        torch_version=torch.__version__,
        kernels="fast" if draft.use_fast_kernels else "plain",
        gemm_dtype="float8"
        if draft.use_float8
        else str(run.step.compute_dtype).removeprefix("torch."),
        total_seq_len=settings.step.total_seq_len,
        supervised_fraction=sum(part.num_targets for part in work) / num_steps / num_tokens,
        ttt_steps=config.num_draft_tokens,
        step_ms=step_ms,
        step_ms_min=min(times.step_ms),
        step_ms_max=max(times.step_ms),
        tokens_per_second=num_tokens / step_ms * 1e3,
        first_step_seconds=times.first_step_seconds,
        loss=_loss(run),
        peak_memory_bytes=times.peak_memory_bytes,
        estimated_memory_bytes=_estimate_memory(settings, config, work, verifier),
        useful_tflop=flops / 1e12,
        useful_tflops=per_second / 1e12,
        utilisation=per_second / gpu.flops if gpu else None,
        data_wait_share=times.wait_share,
        capture_ms=times.capture_ms,
        capture_share=None
        if times.capture_ms is None
        else times.capture_ms * len(times.step_ms) / sum(times.step_ms),
        disk=disk,
        stored=stored,
        launch_ms=launch_ms,
        idle_share=kernels.idle_share if kernels else None,
        split_ms=kernels.split_ms if kernels else None,
        longest_kernels_ms=kernels.longest_ms if kernels else None,
        num_kernels=kernels.num_kernels if kernels else None,
    )


def _estimate_memory(
    settings: BenchSettings, config: DraftConfig, work: Sequence[Work], verifier: VerifierConfig
) -> int:
    """Bytes at the peak, as `train --plan` estimates them."""
    step = settings.step
    memory = ALGORITHMS[config.algorithm].cost.estimate_memory(
        config,
        settings.algorithm_settings,
        work,
        total_seq_len=step.total_seq_len,
        num_accumulated=step.gradient_accumulation_steps,
    )
    if step.capture:
        memory = CaptureCost(verifier).add_memory(memory, total_seq_len=step.total_seq_len)
    return sum(memory.values())


def _loss(run: _Run) -> float:
    """Mean loss over all steps after the first."""
    loss = run.sums.reduce(run.step.ranks)["loss"]
    assert loss is not None, "its samples have supervised tokens"
    return loss


def _read_samples(
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


def _build_step(
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
            is_float8=step.capture_compute_dtype == "float8",
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
    draft.use_float8 = kernels.in_float8
    optimizer = Optimizer(draft, OptimizerSettings(), use_fast_kernels=draft.use_fast_kernels)
    built = OptimizerStep(
        draft, ranks, optimizer, compute_dtype=dtype, noise_std=step.noise_std, seed=seed,
        filler=filler,
    )  # fmt: skip
    return config, built


def _build_loader(
    settings: BenchSettings, samples: SampleSource | None, config: DraftConfig, step: OptimizerStep
) -> BatchSource:
    per_step, seed = settings.step.gradient_accumulation_steps, settings.measure.seed
    if samples is not None:
        return load_batches(
            samples,
            step.ranks,
            total_seq_len=settings.step.total_seq_len,
            seed=seed,
            global_batch=per_step,
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
