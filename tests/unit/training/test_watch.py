"""Which rank the others wait for."""

import pytest

from speculators_cli.core.training.watch import find_behind


@pytest.mark.parametrize(
    ("num_passed", "candidates", "behind"),
    [
        ({0: 7, 1: 7, 2: 7}, (0, 1, 2), []),  # all wait for the same
        ({0: 7, 1: 6, 2: 7}, (0, 1, 2), [1]),
        ({0: 7, 1: 6, 2: 5}, (0, 2), [2]),
        ({0: 5, 1: 7}, (0, 1), [0]),
        ({0: 7}, (0, 1), []),  # nothing is known of the other
    ],
)
def test_a_rank_is_behind_that_has_entered_fewer_collectives(
    num_passed: dict[int, int], candidates: tuple[int, ...], behind: list[int]
) -> None:
    assert find_behind(num_passed, candidates) == behind
