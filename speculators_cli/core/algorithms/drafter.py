"""Drafter: proposes tokens after verified ones, whatever the algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Verified:
    """Newly verified positions: of all rows of a batch, or of one that begins."""

    tokens: Tensor  # [rows, new], int64: the verified token after each position
    aux: Tensor  # [rows, new, aux*hidden]: the verifier's aux hidden states of each position
    firsts: Sequence[int]  # of each row: its first new position
    counts: Sequence[int]  # of each row: how many are verified; the others are to be ignored
    row: int | None = None  # the only row, whose sequence begins; None: all rows


class Drafter(Protocol):
    """Drafts for a batch of sequences, its rows."""

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that it proposes for one verifier pass."""

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch.

        Args:
            num_rows: Rows of the batch.
            num_positions: Maximum length of a row, with its draft tokens.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""

    def read(self, verified: Verified) -> None:
        """Take in newly verified positions."""

    def propose(self) -> Tensor:
        """Draft after the last verified token of each row; [rows, num_draft_tokens], int64."""
