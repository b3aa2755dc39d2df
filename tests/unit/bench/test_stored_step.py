"""When storing hidden states takes less time than computing them."""

import pytest

from speculators_cli.core.bench.stored_step import StoredStep
from speculators_cli.core.data.disk_speed import DiskSpeed


@pytest.mark.parametrize(
    ("read", "step_ms", "num_epochs"),
    [
        # Of 250 ms, 180 are capture: stored after one epoch of capture, it saves 180 each.
        (1e9, 70.0, 1),
        # Reading 40 MB takes 200 ms: 50 ms are saved, of a capture of 180.
        (200e6, 200.0, 4),
        (160e6, 250.0, None),
    ],
)
def test_storing_pays_once_the_saved_time_exceeds_one_capture(
    read: float, step_ms: float, num_epochs: int | None
) -> None:
    disk = DiskSpeed(read, 1e9, bypasses_cache=True, free_bytes=0)

    found = StoredStep.of(40_000_000, disk, step_ms=250.0, capture_ms=180.0, is_float8=False)

    assert found.step_ms == pytest.approx(step_ms)
    assert found.num_epochs == num_epochs


def test_a_disk_that_is_written_slowly_delays_it() -> None:
    disk = DiskSpeed(1e9, 40e6, bypasses_cache=True, free_bytes=0)

    found = StoredStep.of(40_000_000, disk, step_ms=250.0, capture_ms=180.0, is_float8=True)

    assert found.num_epochs == 6  # 1,000 ms of writing, 180 of them saved in each
