"""DeviceFeed where there is no GPU; with one, `tests/gpu/test_train.py` trains through it."""

import time
from collections.abc import Iterator

import pytest
import torch

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.training.feed import DeviceFeed
from tests.tiny_drafts import make_config, make_sample, pack


class Event:
    """A moment on a device, known only once it was waited for; later ones bring earlier ones."""

    reached = 0

    def __init__(self, milliseconds: int) -> None:
        self.milliseconds = milliseconds

    def synchronize(self) -> None:
        Event.reached = max(Event.reached, self.milliseconds)

    def elapsed_time(self, stop: "Event") -> float:
        if Event.reached < stop.milliseconds:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return stop.milliseconds - self.milliseconds


def test_waits_are_added_up_although_the_device_lags_behind() -> None:
    # Trap: CUDA refuses the time between events that are still to come, as at a validation's end.
    feed = DeviceFeed(torch.device("cpu"))
    feed._waits = [(Event(100), Event(130)), (Event(400), Event(420))]  # type: ignore[list-item]

    assert feed.take_wait_seconds() == pytest.approx(0.050)
    assert feed.take_wait_seconds() == 0


def test_steps_pass_through_and_slow_reading_is_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = pack(make_sample(9, make_config(), generator))

    def read() -> Iterator[tuple[Batch, ...]]:
        for _ in range(2):
            time.sleep(0.02)
            yield (batch,)

    feed = DeviceFeed(torch.device("cpu"))
    steps = list(feed.steps(read()))

    assert all(step[0] is batch for step in steps)
    assert len(steps) == 2
    assert feed.take_wait_seconds() >= 0.04
