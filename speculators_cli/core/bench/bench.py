"""bench(settings): time the training step of a draft whose verifier exists by shape alone."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.cost import find_gpu
from speculators_cli.core.bench.profile import KernelTimes, profile_steps
from speculators_cli.core.bench.shapes import find_shape
from speculators_cli.core.bench.synthetic import SyntheticLoader
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.folder import SampleFolder, read_folders
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SILENT, Progress, SilentProgress
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.inputs import Inputs, check_samples_fit, check_targets
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.run import (
    build_draft,
    build_loader,
    choose_compute_dtype,
    out_of_memory_explained,
)
from speculators_cli.core.training.run_log import RunLog
from speculators_cli.core.training.trainer import Trainer
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.train import TrainSettings

# A run that has no end: nothing is saved, validated or logged between its first and last step.
ENDLESS = 2**31


@dataclass(frozen=True)
class BenchReport:
    """What was measured; None is unknown, or has no meaning on this device."""

    verifier: str
    device: str
    torch_version: str
    kernels: str  # `fast` or `plain`
    total_seq_len: int
    supervised_fraction: float
    ttt_steps: int
    step_ms: float  # median
    step_ms_min: float
    step_ms_max: float
    tokens_per_second: float  # documents' tokens; padding does not count
    first_step_seconds: float
    loss: float  # mean of all steps but the first
    peak_memory_bytes: int | None
    estimated_memory_bytes: int  # what `train --plan` would say of the fast kernels
    useful_tflop: float  # a step
    useful_tflops: float  # a second
    utilisation: float | None  # of the device's dense bfloat16 peak
    data_wait_share: float
    launch_ms: float | None  # of the host for a step, without the copy of the next batch
    idle_share: float | None  # of the last profiled step: no kernel computes
    split_ms: dict[str, float] | None  # by kind of kernel
    longest_kernels_ms: dict[str, float] | None  # by name, those that took most of a step
    num_kernels: int | None  # that compute, launched in a step

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def bench(settings: BenchSettings, *, progress: Progress = SILENT) -> BenchReport:
    """Train some steps as `train` does, and time them.

    Raises:
        SettingsError: The verifier cannot be used.
        DataError: The samples cannot be used, or are another verifier's.
        MachineError: Device or memory are in the way.
    """
    verifier, vocab_size = find_shape(settings.shape)
    train_settings = _train_settings(settings, verifier)
    with start_ranks(train_settings.distributed) as ranks:
        samples = _read_samples(settings, verifier, vocab_size, progress)
        trainer = _build_trainer(settings, train_settings, verifier, vocab_size, samples, ranks)
        with closing(trainer), out_of_memory_explained(train_settings):
            return _measure(settings, trainer, verifier.name_or_path)


@dataclass(frozen=True)
class _Times:
    """What the clock showed."""

    step_ms: list[float]
    first_step_seconds: float
    wait_share: float
    peak_memory_bytes: int | None
    masks: list[tuple[torch.Tensor, tuple[int, ...]]]  # loss mask and lengths of each sequence


def _measure(settings: BenchSettings, trainer: Trainer, name: str) -> BenchReport:
    batches = trainer.feed.steps(_endless(trainer))
    trainer.draft.train()
    masks: list[tuple[torch.Tensor, tuple[int, ...]]] = []

    def step() -> None:
        ready = next(batches)
        masks.extend((batch.host_mask, batch.lengths) for batch in ready)
        trainer.train_step(ready, epoch=0)

    times = _time(step, trainer, masks, settings)
    is_cuda = trainer.ranks.device.type == "cuda"
    launch_ms = _time_launch(trainer, batches) if is_cuda else None
    kernels = profile_steps(step) if is_cuda and settings.measure.profile else None
    return _report(settings, trainer, name, times, launch_ms, kernels)


def _time(
    step: Callable[[], None],
    trainer: Trainer,
    masks: list[tuple[torch.Tensor, tuple[int, ...]]],
    settings: BenchSettings,
) -> _Times:
    """The first step, the rest of the warm-up, then each step by itself."""
    device = trainer.ranks.device
    is_cuda = device.type == "cuda"
    clock = _Clock(device)
    step()
    first_step_seconds = clock.stop() / 1e3
    for _ in range(settings.measure.warmup_steps - 1):
        step()
    clock.stop()
    trainer.feed.take_wait_seconds()
    masks.clear()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(device)
    for _ in range(settings.measure.steps):
        step()
        clock.tick()
    step_ms = clock.laps()
    return _Times(
        step_ms=step_ms,
        first_step_seconds=first_step_seconds,
        wait_share=trainer.feed.take_wait_seconds() * 1e3 / sum(step_ms),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
        masks=list(masks),
    )


def _time_launch(trainer: Trainer, batches: Iterator[tuple[Batch, ...]]) -> float:
    """Milliseconds until the host has launched a step, with a GPU that does not hold it up."""
    times = []
    for _ in range(3):
        ready = next(batches)
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        trainer.train_step(ready, epoch=0)
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
        """End a lap, when the device gets here."""
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
    trainer: Trainer,
    name: str,
    times: _Times,
    launch_ms: float | None,
    kernels: KernelTimes | None,
) -> BenchReport:
    draft, device = trainer.draft, trainer.ranks.device
    num_steps, own = settings.measure.steps, trainer.settings.algorithm_settings
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
    return BenchReport(
        verifier=name,
        device=device_name,
        torch_version=torch.__version__,
        kernels="fast" if draft.use_fast_kernels else "plain",
        total_seq_len=settings.step.total_seq_len,
        supervised_fraction=sum(part.num_targets for part in work) / num_steps / num_tokens,
        ttt_steps=settings.step.ttt_steps,
        step_ms=step_ms,
        step_ms_min=min(times.step_ms),
        step_ms_max=max(times.step_ms),
        tokens_per_second=num_tokens / step_ms * 1e3,
        first_step_seconds=times.first_step_seconds,
        loss=_loss(trainer),
        peak_memory_bytes=times.peak_memory_bytes,
        estimated_memory_bytes=sum(
            cost.estimate_memory(
                config,
                own,
                work,
                total_seq_len=settings.step.total_seq_len,
                num_accumulated=settings.step.gradient_accumulation_steps,
            ).values()
        ),
        useful_tflop=flops / 1e12,
        useful_tflops=per_second / 1e12,
        utilisation=per_second / gpu.flops if gpu else None,
        data_wait_share=times.wait_share,
        launch_ms=launch_ms,
        idle_share=kernels.idle_share if kernels else None,
        split_ms=kernels.split_ms if kernels else None,
        longest_kernels_ms=kernels.longest_ms if kernels else None,
        num_kernels=kernels.num_kernels if kernels else None,
    )


def _loss(trainer: Trainer) -> float:
    """Mean loss of all steps since the first."""
    loss = trainer.log.sums.reduce(trainer.ranks)["loss"]
    assert loss is not None, "all tokens of its samples are supervised"
    return loss


def _endless(trainer: Trainer) -> Iterator[tuple[Batch, ...]]:
    """Steps of one epoch after the other."""
    for epoch in count():
        yield from trainer.loader.epoch(epoch)


def _train_settings(settings: BenchSettings, verifier: VerifierConfig) -> TrainSettings:
    """The settings of a run that trains such a draft."""
    shape, step, samples = settings.shape, settings.step, settings.samples
    return TrainSettings.model_validate(
        {
            "draft": {
                "verifier_name_or_path": verifier.name_or_path,
                "full_vocab": True,  # no map is read from disk
                "num_layers": shape.num_layers,
                "draft_arch": shape.draft_arch,
            },
            "data": {
                "data_path": samples.data_path or (Path.cwd(),),
                "total_seq_len": step.total_seq_len,
                "noise_std": step.noise_std,
                "num_workers": samples.num_workers,
                "prefetch_factor": samples.prefetch_factor,
            },
            "eagle3": {"ttt_steps": step.ttt_steps, "train_head": step.train_head},
            "optimizer": {"gradient_accumulation_steps": step.gradient_accumulation_steps},
            "schedule": {"scheduler": "none"},
            "run": {"seed": settings.measure.seed, "log_every_steps": ENDLESS},
            "distributed": {
                "device": step.device,
                "compute_dtype": step.compute_dtype,
                "kernels": step.kernels,
            },
        }
    )


def _read_samples(
    settings: BenchSettings, verifier: VerifierConfig, vocab_size: int, progress: Progress
) -> SampleFolder:
    """The samples to train on; none if they are made up."""
    samples = settings.samples
    if not samples.data_path:
        return SampleFolder((), "v1")
    dataset = read_folders(
        samples.data_path,
        data_format=samples.data_format,
        version=samples.data_format_version,
        index_file=None,
        max_bad_samples=None,
        progress=progress,
    )
    check_samples_fit(dataset, verifier, vocab_size)
    check_targets(dataset, settings.step.total_seq_len, samples.data_path[0])
    return dataset


def _build_trainer(
    settings: BenchSettings,
    train_settings: TrainSettings,
    verifier: VerifierConfig,
    vocab_size: int,
    samples: SampleFolder,
    ranks: Ranks,
) -> Trainer:
    """Parts as `train` builds them, around random frozen parts of the verifier."""
    shape, seed = settings.shape, settings.measure.seed
    if shape.full_vocab:
        vocab_map = VocabMap.full(vocab_size)
    else:
        counts = np.random.default_rng(seed).permutation(vocab_size)
        vocab_map = VocabMap.choose(counts, min(shape.draft_vocab_size, vocab_size))
    inputs = Inputs(
        samples=samples,
        validation_samples=samples,
        vocab_map=vocab_map,
        verifier_files=VerifierFiles(verifier.name_or_path),
        verifier_config=verifier,
        layer_ids=LayerIds(default_layer_ids(verifier.num_layers), is_assumed=True),
        source=None,
    )
    draft = build_draft(
        train_settings, inputs, _random_verifier(verifier, vocab_size, ranks.device, seed)
    )
    per_step = settings.step.gradient_accumulation_steps
    dtype = choose_compute_dtype(train_settings, ranks.device)
    if len(samples):
        loader: BatchSource = build_loader(
            train_settings, samples, ranks, per_step, num_epochs=ENDLESS
        )
    else:
        loader = SyntheticLoader(
            draft.config,
            total_seq_len=settings.step.total_seq_len,
            supervised_fraction=settings.step.supervised_fraction,
            per_step=per_step,
            dtype=dtype,
            pin_memory=ranks.device.type == "cuda",
            seed=seed,
        )
    return Trainer(
        settings=train_settings,
        ranks=ranks,
        draft=draft,
        optimizer=Optimizer(
            draft, train_settings.optimizer, use_fast_kernels=draft.use_fast_kernels
        ),
        loader=loader,
        validation_loader=None,
        compute_dtype=dtype,
        state=_fresh_state(per_step),
        total_steps=ENDLESS,
        folder=None,
        log=RunLog(
            ranks=ranks,
            samples=samples,
            draft=draft,
            num_epochs=1,
            total_steps=ENDLESS,
            logger=None,
            progress=SilentProgress(),
        ),
    )


def _random_verifier(
    config: VerifierConfig, vocab_size: int, device: torch.device, seed: int
) -> FrozenVerifier:
    generator = torch.Generator(device).manual_seed(seed)

    def weights() -> torch.Tensor:
        empty = torch.empty(vocab_size, config.hidden_size, dtype=torch.bfloat16, device=device)
        return empty.normal_(std=0.02, generator=generator)

    gain = torch.ones(config.hidden_size, device=device)
    return FrozenVerifier(weights(), gain, weights(), config)


def _fresh_state(per_step: int) -> TrainState:
    return TrainState(
        step=0,
        epoch=0,
        step_in_epoch=0,
        run_id="",
        started_at=0.0,
        global_batch=per_step,
        num_ranks=1,
        data_hash="",
        vocab_map_hash="",
        settings={},
        best=None,
        num_skipped_steps=0,
        metrics={},
    )
