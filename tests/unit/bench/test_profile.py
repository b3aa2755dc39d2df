"""Idle and busy time of profiled kernels."""

import pytest

from speculators_cli.core.bench.profile import share_of_gaps, time_of


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 0.0),
        ([(3, 5)], 0.0),
        ([(0, 4), (4, 10)], 0.0),
        ([(0, 4), (6, 10)], 0.2),
        ([(0, 9), (1, 2), (10, 20)], 0.05),  # one beside another
    ],
)
def test_gaps_are_what_no_kernel_covers(spans: list[tuple[float, float]], share: float) -> None:
    assert share_of_gaps(spans) == pytest.approx(share)


@pytest.mark.parametrize(
    ("spans", "time"),
    [
        ([], 0.0),
        ([(3, 5), (7, 8)], 3.0),
        ([(7, 8), (3, 5)], 3.0),
        ([(0, 9), (1, 2), (8, 20)], 20.0),  # one within another, one beside another
    ],
)
def test_time_is_counted_once_where_kernels_overlap(
    spans: list[tuple[float, float]], time: float
) -> None:
    assert time_of(spans) == pytest.approx(time)
