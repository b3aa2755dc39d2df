"""Ways to get hidden states, compared for a verifier, a GPU and a disk."""

from collections.abc import Sequence
from dataclasses import dataclass

from speculators_cli.core.data.disk_speed import DiskSpeed


@dataclass(frozen=True)
class CaptureOption:
    """One way, and what a run takes with it."""

    name: str
    seconds: float  # of the whole run, with all of its captures
    disk_bytes: int
    fits: bool  # whether the disk has room for it


@dataclass(frozen=True)
class CaptureTimes:
    """What a run takes, without a disk."""

    step_seconds: float  # of the steps of all epochs
    capture_seconds: float  # of all samples, once
    num_epochs: float
    is_apart: bool = False  # whether other GPUs capture, during the steps

    def epoch(self, share: float = 1.0) -> float:
        """Seconds of an epoch in which a share of the samples is captured."""
        step, capture = self.step_seconds / self.num_epochs, self.capture_seconds * share
        return max(step, capture) if self.is_apart else step + capture


@dataclass(frozen=True)
class Cached:
    """A cache of a part of the samples."""

    share: float
    num_bytes: int


def compare_options(
    times: CaptureTimes, disk: DiskSpeed, stored_bytes: dict[str, int], cached: Cached | None
) -> tuple[CaptureOption, ...]:
    """Estimate a run with each option.

    Args:
        times: Of the run.
        disk: Where hidden states would be kept.
        stored_bytes: Size of all samples, by the name of the way to store them.
        cached: The cache that is asked for, if one is.
    """
    options = [CaptureOption("online", times.num_epochs * times.epoch(), 0, fits=True)]
    for name, num_bytes in stored_bytes.items():
        capture = max(times.capture_seconds, num_bytes / disk.written_bytes_per_second)
        epoch = max(times.epoch(0.0), num_bytes / disk.read_bytes_per_second)
        seconds = capture + times.num_epochs * epoch
        options.append(CaptureOption(name, seconds, num_bytes, num_bytes <= disk.free_bytes))
    if cached is not None:
        size = cached.num_bytes
        first = max(times.epoch(), size / disk.written_bytes_per_second)
        later = max(times.epoch(1 - cached.share), size / disk.read_bytes_per_second)
        seconds = first + max(times.num_epochs - 1, 0.0) * later
        options.append(CaptureOption("online with cache", seconds, size, size <= disk.free_bytes))
    return tuple(options)


def find_best(options: Sequence[CaptureOption]) -> str | None:
    """Return the name of the fastest option that fits, the first one of equals."""
    fitting = [option for option in options if option.fits]
    return min(fitting, key=lambda option: option.seconds).name if fitting else None
