"""Timing of optimizer steps."""

import statistics
import time
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch

from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.training.feed import DeviceFeed
from speculators_cli.core.training.metrics import MetricSums
from speculators_cli.core.training.optimizer_step import OptimizerStep
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.train import OptimizerSettings

LEARNING_RATE = OptimizerSettings().lr


class Run:
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
class StepTimes:
    """The measured times."""

    step_ms: list[float]
    first_step_seconds: float
    wait_share: float
    capture_ms: float | None  # per step
    peak_memory_bytes: int | None
    masks: list[tuple[torch.Tensor, tuple[int, ...]]]  # loss mask and lengths of each sequence


def time_steps(run: Run, settings: BenchSettings) -> StepTimes:
    """Time the first step, run the rest of the warmup, then time each step."""
    is_cuda = run.device.type == "cuda"
    clock = Clock(run.device)
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
    clock = Clock(run.device)
    for _ in range(settings.measure.steps):
        run.train_next()
        clock.tick()
    step_ms = clock.laps()
    captured = run.step.filler.take_seconds()
    return StepTimes(
        step_ms=step_ms,
        first_step_seconds=first_step_seconds,
        capture_ms=None if captured is None else captured * 1e3 / len(step_ms),
        wait_share=run.feed.take_wait_seconds() * 1e3 / sum(step_ms),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
        masks=list(run.masks),
    )


def time_launch(run: Run) -> float:
    """Milliseconds of the host to launch a step, while the GPU is idle."""
    times = []
    for _ in range(3):
        ready = run.take()
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        run.train(ready)
        times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times)


class Clock:
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


def mean_loss(run: Run) -> float:
    """Mean loss over all steps after the first."""
    loss = run.sums.reduce(run.step.ranks)["loss"]
    assert loss is not None, "its samples have supervised tokens"
    return loss
