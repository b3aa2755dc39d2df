"""VerifierInput: the verifier's tokens from which the hidden states of a batch are computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

ROUND_TOKENS = 256  # a padded input has a multiple of it, so that few lengths occur


@dataclass(frozen=True)
class VerifierInput:
    """The verifier's own tokens of the documents of a batch, from which its states are computed.

    A document has `alignment.shift` more tokens than positions: its first token is in no position.
    """

    input_ids: Tensor  # [tokens], int64
    position_ids: Tensor  # [tokens], int64: from 0 in each document
    aux_rows: Tensor  # [positions], int64, ascending: the token whose aux states a position reads
    last_rows: Tensor  # [targets], int64, ascending: the token of each target
    lengths: tuple[int, ...]  # tokens of each document; the last one is padding if `is_padded`
    is_padded: bool
    num_positions: tuple[int, ...]  # of each document, without padding
    num_targets: tuple[int, ...]
    sample_ids: tuple[int, ...] = ()  # of each document, without padding
    ticket: "Ticket | None" = None  # of states that are on their way already
    places: "Places | None" = None  # in a batch that has other hidden states already
    slots: tuple["CacheSlot | None", ...] = ()  # of the documents, to write their states to

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            aux_rows=change(self.aux_rows),
            last_rows=change(self.last_rows),
            places=None
            if self.places is None
            else Places(change(self.places.positions), change(self.places.targets)),
        )


class Ticket(Protocol):
    """States that were requested ahead."""

    def cancel(self) -> None:
        """Say that nobody waits for them."""


@dataclass(frozen=True)
class Places:
    """Where computed hidden states are written in a batch."""

    positions: Tensor  # [positions], int64: rows of the aux hidden states
    targets: Tensor  # [targets], int64: rows of the last hidden states


@dataclass(frozen=True)
class CacheSlot:
    """Where the states of a document are kept, and what is written with them."""

    file: Path
    input_ids: Tensor  # [tokens], int64, on the CPU
    loss_mask: Tensor  # [tokens], bool, on the CPU: True where last hidden states are computed


def plan_input(
    documents: Sequence[Tensor],  # [tokens] each, int64
    targets: Tensor,  # [targets], int64, ascending: positions of the packed sequence
    *,
    shift: int,
    padded_to: int | None,
) -> VerifierInput:
    """Join the tokens of documents, and find the tokens that positions read.

    Args:
        documents: Tokens that the positions of each document need; one without positions is empty.
        targets: Positions whose last hidden states are needed.
        shift: Of the alignment.
        padded_to: Length of the input, unless it has more tokens; None: no padding.
    """
    lengths = [len(ids) for ids in documents]
    starts = [0, *accumulate(lengths)]
    positions = [
        torch.arange(start, start + max(length - shift, 0))
        for start, length in zip(starts, lengths, strict=False)
    ]
    aux_rows = torch.cat([torch.empty(0, dtype=torch.int64), *positions])
    bounds = torch.tensor([0, *accumulate(map(len, positions))])
    num_padding = 0
    if padded_to is not None:
        num_padding = padded_to - starts[-1]
        num_padding = num_padding if num_padding >= 0 else -starts[-1] % ROUND_TOKENS
    all_lengths = [*lengths, num_padding] if num_padding else lengths
    return VerifierInput(
        input_ids=torch.cat([*documents, torch.zeros(num_padding, dtype=torch.int64)]),
        position_ids=torch.cat([aux_rows[:0], *map(torch.arange, all_lengths)]),
        aux_rows=aux_rows,
        last_rows=aux_rows[targets] + shift,
        lengths=tuple(all_lengths),
        is_padded=num_padding > 0,
        num_positions=tuple(map(len, positions)),
        num_targets=tuple(torch.searchsorted(targets, bounds).diff().tolist()),
    )


def padded_length(total_seq_len: int) -> int:
    """Return the usual number of tokens that the verifier computes for a packed sequence."""
    return (total_seq_len // ROUND_TOKENS + 1) * ROUND_TOKENS
