"""Alignment: which rows of a sample are positions of a packed sequence, and which are targets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Alignment:
    """Offset of tokens relative to the aux hidden states that a draft reads with them.

    Position `i` of a document consists of token `x[i + shift]` of its sample, the aux hidden states
    `g[i]`, and the last hidden states `y[i + shift]`, whose distribution predicts the token after
    `x[i + shift]`. It is a target if the loss mask of `x[i + shift]` is set.
    """

    shift: int  # tokens

    def count_positions(self, num_tokens: int) -> int:
        """Return the number of positions of a sample with this many tokens."""
        return max(num_tokens - self.shift, 0)

    def tokens(self, num_positions: int) -> slice:
        """Return the slice of tokens, loss mask and last hidden states of the first positions."""
        return slice(self.shift, self.shift + num_positions)

    def find_targets(
        self,
        loss_mask: NDArray[np.bool_],  # [seq_len]
    ) -> NDArray[np.int64]:
        """Return the ascending indices of the tokens of a sample that are targets; [targets]."""
        return np.flatnonzero(loss_mask[self.shift :]) + self.shift

    def place(self, token: int) -> int:
        """Return the position of a token of a sample."""
        return token - self.shift

    def has_target(self, first_target: int, num_positions: int) -> bool:
        """Whether the first target of a sample is among its first positions; -1 if it has none."""
        return first_target >= 0 and self.place(first_target) < num_positions


# For any draft that reads a token with the hidden states of the previous position.
NEXT_TOKEN = Alignment(shift=1)
