"""Options for hidden states, compared by hand-computed times."""

import pytest

from speculators_cli.core.data.disk_speed import DiskSpeed
from speculators_cli.core.training.capture_options import (
    Cached,
    CaptureOption,
    CaptureTimes,
    compare_options,
    find_best,
)

STORED = {"stored": 4000, "stored in float8": 2000}


def disk(*, read: float = 1e9, written: float = 1e9, free: int = 10**9) -> DiskSpeed:
    return DiskSpeed(read, written, bypasses_cache=True, free_bytes=free)


def seconds(options: tuple[CaptureOption, ...]) -> dict[str, float]:
    return {option.name: option.seconds for option in options}


def test_a_fast_disk_is_limited_by_steps_and_one_capture() -> None:
    times = CaptureTimes(step_seconds=30.0, capture_seconds=20.0, num_epochs=3)

    options = compare_options(times, disk(), STORED, Cached(0.5, 1000))

    assert seconds(options) == {
        "online": pytest.approx(90.0),
        "stored": pytest.approx(50.0),
        "stored in float8": pytest.approx(50.0),
        "online with cache": pytest.approx(30 + 2 * 20),
    }
    assert find_best(options) == "stored"


def test_a_slow_disk_makes_storing_slower_than_computing() -> None:
    times = CaptureTimes(step_seconds=30.0, capture_seconds=20.0, num_epochs=3)
    slow = disk(read=100.0, written=50.0)

    options = compare_options(times, slow, STORED, Cached(0.5, 1500))

    assert seconds(options) == {
        "online": pytest.approx(90.0),
        "stored": pytest.approx(4000 / 50 + 3 * 4000 / 100),
        "stored in float8": pytest.approx(2000 / 50 + 3 * 2000 / 100),
        # Written in 30 s, which the first epoch takes as well; then 15 s of reading under 20 s.
        "online with cache": pytest.approx(30 + 2 * 20),
    }
    assert find_best(options) == "online with cache"


def test_what_does_not_fit_is_never_the_best() -> None:
    times = CaptureTimes(step_seconds=30.0, capture_seconds=20.0, num_epochs=3)

    options = compare_options(times, disk(free=2500), STORED, None)

    assert [option.fits for option in options] == [True, False, True]
    assert find_best(options) == "stored in float8"
    assert find_best(compare_options(times, disk(free=10), STORED, None)) == "online"


def test_gpus_of_their_own_capture_during_the_steps() -> None:
    times = CaptureTimes(step_seconds=30.0, capture_seconds=8.0, num_epochs=3, is_apart=True)

    options = compare_options(times, disk(), STORED, None)

    assert seconds(options)["online"] == pytest.approx(30.0)
    assert find_best(options) == "online"
