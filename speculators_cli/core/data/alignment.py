"""Alignment: which rows of a sample are positions of a packed sequence, and which are targets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Alignment:
    """How far tokens are ahead of the aux hidden states that a draft reads with them.

    Position `i` of a document holds token `x[i + shift]` of its sample, the aux hidden states
    `g[i]`, and the last hidden states `y[i + shift]`, whose distribution predicts the token after
    `x[i + shift]`. It is a target where the loss mask of `x[i + shift]` is set.
    """

    shift: int  # tokens

    def count_positions(self, num_tokens: int) -> int:
        """Positions of a sample of so many tokens."""
        return max(num_tokens - self.shift, 0)

    def tokens(self, num_positions: int) -> slice:
        """The tokens of the first positions; also their loss mask and last hidden states."""
        return slice(self.shift, self.shift + num_positions)

    def find_targets(
        self,
        loss_mask: NDArray[np.bool_],  # [seq_len]
    ) -> NDArray[np.int64]:
        """Indices of the tokens of a sample that are targets, ascending; [targets]."""
        return np.flatnonzero(loss_mask[self.shift :]) + self.shift

    def place(self, token: int) -> int:
        """The position that holds a token of a sample."""
        return token - self.shift

    def has_target(self, first_target: int, num_positions: int) -> bool:
        """Whether the first target of a sample is among its first positions; -1: it has none."""
        return first_target >= 0 and self.place(first_target) < num_positions


# EAGLE-3's, and that of every draft that reads a token beside the features of the one before it.
NEXT_TOKEN = Alignment(shift=1)
