"""Last hidden states that exist at supervised tokens only."""

import pytest
import torch

from speculators_cli.core.data.supervised_rows import SupervisedRows, held_states, held_tokens

MASK = torch.tensor([False, True, True, False, False, True, False])
ROWS = torch.arange(15.0).reshape(3, 5)


def test_rows_are_indexed_by_tokens() -> None:
    states = SupervisedRows(ROWS, MASK)

    assert torch.equal(states[1:3], ROWS[:2])
    assert torch.equal(states[torch.tensor([2, 5])], ROWS[1:])
    assert torch.equal(states[MASK], ROWS)
    assert len(states[torch.tensor([], dtype=torch.int64)]) == 0
    assert (states.shape, len(states), states.dtype) == ((7, 5), 7, torch.float32)


@pytest.mark.parametrize("rows", [slice(0, 3), torch.tensor([1, 3]), ~MASK], ids=str)
def test_a_row_that_does_not_exist_is_refused(rows: "slice | torch.Tensor") -> None:
    with pytest.raises(IndexError, match="at supervised tokens only, not at"):
        SupervisedRows(ROWS, MASK)[rows]


def test_all_rows_are_not_to_be_had_unless_all_are_supervised() -> None:
    with pytest.raises(IndexError):
        list(SupervisedRows(ROWS, MASK).split(2))

    parts = list(SupervisedRows(ROWS, torch.ones(3, dtype=torch.bool)).split(2))

    assert torch.equal(torch.cat(parts), ROWS)


def test_another_number_of_rows_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        SupervisedRows(ROWS[:2], MASK)


def test_what_exists_is_found() -> None:
    states = SupervisedRows(ROWS, MASK)

    assert held_states(states) is ROWS
    assert torch.equal(held_tokens(states), MASK)
    assert held_states(ROWS) is ROWS
    assert held_tokens(ROWS).tolist() == [True] * 3
