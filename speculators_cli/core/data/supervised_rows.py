"""Last hidden states at supervised tokens only."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import States
from speculators_cli.core.data.stored import find_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SupervisedRows:
    """Hidden states of a sample, of which only the rows of supervised tokens exist.

    Its shape and its rows are those of the whole sample.

    Args:
        held: [supervised tokens, hidden]: a row for each supervised token, in order.
        loss_mask: [seq_len], bool: True where the token is supervised.
    """

    def __init__(self, held: States, loss_mask: "Tensor") -> None:
        assert len(held) == int(loss_mask.sum()), "one row for each supervised token"
        self.held = held
        self.loss_mask = loss_mask
        self.shape = (len(loss_mask), held.shape[1])

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of the values."""
        return self.held.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "slice | Tensor") -> "Tensor":
        """Return rows of supervised tokens.

        Raises:
            IndexError: A token is not supervised.
        """
        return self.held[self.locate(rows)]

    def split(self, num_rows: int) -> Iterator["Tensor"]:
        """Yield all rows, if every token is supervised."""
        for start in range(0, len(self), num_rows):
            yield self[start : start + num_rows]

    def locate(self, rows: "slice | Tensor") -> "Tensor":
        """Return the indices among the held rows of tokens, which must be supervised; int64."""
        import torch

        tokens = find_rows(rows, len(self))
        is_held = self._mask[tokens]
        if not is_held.all():
            missing = tokens[~is_held]
            raise IndexError(
                f"Last hidden states are held at supervised tokens only, not at {len(missing):,} "
                f"of {len(tokens):,} requested tokens, such as {missing[0]:,}"
            )
        return torch.from_numpy(self._places[tokens])

    @cached_property
    def _mask(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.loss_mask.numpy()
        return mask

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Return the index of each supervised token among them; [seq_len]."""
        return self._mask.cumsum(dtype=np.int64) - 1


def held_states(states: States) -> States:
    """Return the rows that exist, in order."""
    return states.held if isinstance(states, SupervisedRows) else states


def held_tokens(states: States) -> "Tensor":
    """Return the mask of tokens whose rows exist; [seq_len], bool."""
    import torch

    if isinstance(states, SupervisedRows):
        return states.loss_mask
    return torch.ones(len(states), dtype=torch.bool)
