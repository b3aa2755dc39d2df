"""Drafter: proposes tokens after verified ones, whatever the algorithm."""

from typing import Protocol

from torch import Tensor


class Drafter(Protocol):
    """Drafts for one sequence after the other."""

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that it proposes for one verifier pass."""

    def start(self) -> None:
        """Begin a new sequence."""

    def propose(
        self,
        tokens: Tensor,  # [new], int64: the verified tokens after those positions
        aux_hidden_states: tuple[Tensor, ...],  # [new, hidden] each, of positions not yet seen
    ) -> list[int]:
        """Take in newly verified positions, then draft after the last of `tokens`."""
