"""DeviceFeed: prefetches batches to the device, one optimizer step ahead."""

import time
from collections.abc import Iterator

import torch

from speculators_cli.core.data.batch import Batch

StepBatches = tuple[Batch, ...]


class DeviceFeed:
    """Copies batches on a separate stream, and measures how long the device waits for them.

    While the device computes one step, the next step's batches are read and copied; the host
    fetches them only after it has enqueued the current step. Waiting is measured on the device, by
    events around the point where a step needs its batches.

    Args:
        device: Destination of the batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def steps(self, batches: Iterator[StepBatches]) -> Iterator[StepBatches]:
        """The batches of each optimizer step, on the device, in the dtype of their files."""
        if self.stream is None:
            yield from self._timed(batches)
            return
        compute = torch.cuda.current_stream(self.device)
        idle_from = _mark(compute)
        ready = self._copy(next(batches, None))
        while ready is not None:
            step, copied = ready
            compute.wait_event(copied)
            for batch in step:
                batch.record_stream(compute)
            self._waits.append((idle_from, _mark(compute)))
            yield step
            idle_from = _mark(compute)
            del step, ready
            ready = self._copy(next(batches, None))

    def take_wait_seconds(self) -> float:
        """Seconds waited since the last call; blocks until the device uses the last batches."""
        waits, self._waits = self._waits, []
        if waits:
            waits[-1][1].synchronize()
        self._seconds += sum(start.elapsed_time(stop) for start, stop in waits) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _copy(self, step: StepBatches | None) -> tuple[StepBatches, torch.cuda.Event] | None:
        """Batches copied to the device, and the event that marks the end of the copy.

        States in float8 are scaled there, which needs memory bandwidth that products leave unused.
        """
        if step is None:
            return None
        assert self.stream is not None, "a GPU has one"
        with torch.cuda.stream(self.stream):
            moved = tuple(batch.to(self.device).scale() for batch in step)
        return moved, self.stream.record_event()

    def _timed(self, batches: Iterator[StepBatches]) -> Iterator[StepBatches]:
        """Batches without prefetching, for a device that shares the host's memory."""
        while True:
            asked_at = time.perf_counter()
            step = next(batches, None)
            self._seconds += time.perf_counter() - asked_at
            if step is None:
                return
            yield step


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    stream.record_event(event)
    return event
