"""bench(settings): time the training step of a draft, without the verifier's weights."""

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.cost import Work, find_gpu
from speculators_cli.core.bench.parts import build_loader, build_step, read_samples
from speculators_cli.core.bench.profile import KernelTimes, profile_steps
from speculators_cli.core.bench.shapes import find_shape
from speculators_cli.core.bench.stored_step import StoredStep
from speculators_cli.core.bench.timing import Run, StepTimes, mean_loss, time_launch, time_steps
from speculators_cli.core.data.disk_speed import DiskSpeed, measure_disk
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.models.verifier import VerifierConfig
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.training.distributed import Ranks, end_process, start_ranks
from speculators_cli.core.training.run import out_of_memory_explained
from speculators_cli.settings.bench import BenchSettings

TIMEOUT_SECONDS = 300  # of collectives


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
    tokens_per_second: float  # tokens of documents, over all ranks; padding is excluded
    num_ranks: int
    num_shards: int  # of weights and optimizer state; 1: whole on each rank
    alone_step_ms: float | None  # median of the same step without other ranks; None for one rank
    efficiency: float | None  # tokens/s, compared with what these ranks reach each by itself
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
    idle_share: float | None  # fraction of the last profiled step without a kernel that computes
    exposed_ms: float | None  # of the last profiled step: ranks communicate, and nothing computes
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

    def end_now(error: SpeculatorsError) -> None:
        progress.error(error)
        end_process(error)

    with start_ranks(settings.step.device, TIMEOUT_SECONDS, end=end_now) as ranks:
        ranks.connect(TIMEOUT_SECONDS)
        return bench_on(settings, ranks, progress=progress)


def bench_on(settings: BenchSettings, ranks: Ranks, *, progress: Progress = SILENT) -> BenchReport:
    """The same on ranks that are connected; all must call."""
    _free_memory(ranks.device)
    verifier, vocab_size = find_shape(settings.shape)
    samples = read_samples(settings, verifier, vocab_size, progress)
    task = _Task(settings, verifier, vocab_size, samples)
    with out_of_memory_explained(settings.step.total_seq_len), ranks.ending_when_stuck():
        alone_ms = _time_alone(task, ranks) if ranks.num_ranks > 1 else None
        with task.running(ranks, seed=settings.measure.seed + ranks.rank) as run:
            return _report(settings, run, verifier, *_measure(settings, run), alone_ms)


@dataclass(frozen=True)
class _Task:
    """What is timed."""

    settings: BenchSettings
    verifier: VerifierConfig
    vocab_size: int
    samples: SampleSource | None

    @contextmanager
    def running(self, ranks: Ranks, *, seed: int) -> Iterator[Run]:
        """The steps of these ranks; each has a seed for its samples."""
        config, step = build_step(self.settings, self.verifier, self.vocab_size, ranks)
        with closing(build_loader(self.settings, self.samples, config, step, seed)) as loader:
            yield Run(step, loader)


def _time_alone(task: _Task, ranks: Ranks) -> float:
    """Median milliseconds of a step of each rank by itself, all at the same time; their mean."""
    alone = Ranks(0, 1, ranks.local_rank, ranks.num_local_ranks, ranks.device, None)
    with task.running(alone, seed=task.settings.measure.seed + ranks.rank) as run:
        own = statistics.median(time_steps(run, task.settings).step_ms)
    del run
    _free_memory(ranks.device)
    total = ranks.sum(torch.tensor(own, dtype=torch.float64))
    return total.item() / ranks.num_ranks


def _free_memory(device: torch.device) -> None:
    """Free the drafts that were timed before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(
    settings: BenchSettings, run: Run
) -> tuple[StepTimes, float | None, KernelTimes | None]:
    times = time_steps(run, settings)
    is_cuda = run.device.type == "cuda"
    launch_ms = time_launch(run) if is_cuda else None
    kernels = profile_steps(run.train_next) if is_cuda and settings.measure.profile else None
    return times, launch_ms, kernels


def _report(
    settings: BenchSettings,
    run: Run,
    verifier: VerifierConfig,
    times: StepTimes,
    launch_ms: float | None,
    kernels: KernelTimes | None,
    alone_ms: float | None,
) -> BenchReport:
    draft, device = run.step.draft, run.device
    num_steps, own = settings.measure.steps, settings.algorithm_settings
    config = draft.config
    cost = ALGORITHMS[config.algorithm].cost
    work = [cost.count_work(config, own, mask, lengths) for mask, lengths in times.masks]
    num_tokens = sum(part.num_positions for part in work) / num_steps
    num_ranks = run.step.ranks.num_ranks
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
        tokens_per_second=num_tokens * num_ranks / step_ms * 1e3,
        num_ranks=num_ranks,
        num_shards=run.step.weights.num_shards,
        alone_step_ms=alone_ms,
        efficiency=None if alone_ms is None else alone_ms / step_ms,
        first_step_seconds=times.first_step_seconds,
        loss=mean_loss(run),
        peak_memory_bytes=times.peak_memory_bytes,
        estimated_memory_bytes=_estimate_memory(settings, run, work, verifier),
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
        exposed_ms=kernels.exposed_ms if kernels else None,
        split_ms=kernels.split_ms if kernels else None,
        longest_kernels_ms=kernels.longest_ms if kernels else None,
        num_kernels=kernels.num_kernels if kernels else None,
    )


def _estimate_memory(
    settings: BenchSettings, run: Run, work: Sequence[Work], verifier: VerifierConfig
) -> int:
    """Bytes at the peak, as `train --plan` estimates them."""
    step, config = settings.step, run.step.draft.config
    memory = ALGORITHMS[config.algorithm].cost.estimate_memory(
        config,
        settings.algorithm_settings,
        work,
        total_seq_len=step.total_seq_len,
        num_accumulated=step.gradient_accumulation_steps,
        num_ranks=run.step.ranks.num_ranks,
        num_shards=run.step.weights.num_shards,
        has_whole_head=step.capture,
        in_float8=run.step.draft.use_float8,
    )
    if step.capture:
        capture = CaptureCost(verifier, in_float8=step.captures_in_float8)
        memory = capture.add_memory(memory, total_seq_len=step.total_seq_len)
    return sum(memory.values())
