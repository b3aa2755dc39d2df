"""Sample: the tensors of one conversation, and what makes it valid."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TOKEN_ID = 2**24 - 1  # far beyond any vocabulary: counts and maps are as large as the highest


@dataclass(frozen=True)
class SampleHeader:
    """What is known of a sample without reading its hidden states."""

    num_tokens: int
    num_supervised_tokens: int  # of the tokens that can be predicted: all but the first
    hidden_size: int
    num_aux_layers: int
    dtype: str  # of the hidden states on disk, or one that holds all of theirs: `bfloat16`, ...
    is_normed: bool  # whether the last hidden states are after the verifier's final norm
    max_token_id: int  # -1 in an empty sample
    first_target: int  # index of the first supervised token that can be predicted; -1: none

    def has_target(self, total_seq_len: int) -> bool:
        """Whether a token is supervised in what a packed sequence of this many tokens holds."""
        return 0 < self.first_target <= total_seq_len


@dataclass(frozen=True)
class SampleTokens:
    """A sample without its hidden states."""

    header: SampleHeader
    input_ids: NDArray[np.int64]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]
    fingerprint: str  # changes with the contents of the file, which was not read whole

    @classmethod
    def with_header(
        cls,
        input_ids: NDArray[np.int64],  # [seq_len]
        loss_mask: NDArray[np.bool_],  # [seq_len]
        *,
        hidden_size: int,
        num_aux_layers: int,
        dtype: str,
        is_normed: bool,
        fingerprint: str,
    ) -> Self:
        """Ids and mask with the header that follows from them."""
        targets = np.flatnonzero(loss_mask[1:]) + 1
        header = SampleHeader(
            num_tokens=len(input_ids),
            num_supervised_tokens=len(targets),
            hidden_size=hidden_size,
            num_aux_layers=num_aux_layers,
            dtype=dtype,
            is_normed=is_normed,
            max_token_id=int(input_ids.max()) if len(input_ids) else -1,
            first_target=int(targets[0]) if len(targets) else -1,
        )
        return cls(header, input_ids, loss_mask, fingerprint)


class States(Protocol):
    """Hidden states [seq_len, hidden]: a tensor, or what reads rows of a file when they are taken.

    Taking rows of a file raises `ChangedSampleError` where it is no longer as it was.
    """

    @property
    def dtype(self) -> "torch.dtype":
        """Any float type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and hidden size."""

    def __len__(self) -> int:
        """Tokens."""

    def __getitem__(self, rows: "slice | Tensor", /) -> "Tensor":
        """Rows: a slice of them, those of ascending indices, or those where a mask is True."""

    def split(self, num_rows: int, /) -> Iterable["Tensor"]:
        """All rows, so many at a time."""


@dataclass(frozen=True)
class Sample:
    """One conversation. Hidden states of one that is read stay in its file, which it keeps open."""

    input_ids: "Tensor"  # [seq_len], int64
    loss_mask: "Tensor"  # [seq_len], bool: True where the token is supervised
    aux_hidden_states: tuple[States, ...]  # aux layers of [seq_len, hidden], any float dtype
    last_hidden_states: States  # [seq_len, hidden], any float dtype
    is_normed: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, as the end of a sentence that begins with its name."""

    file: Path
    problem: str


class BadSampleError(DataError):
    """One file that is not a usable sample.

    Args:
        reason: What is wrong with it, as the end of a sentence that begins with its name.
        other_format: The data format it is a sample of, if not of the one it was read as.
        message: Of the error, where it names the file.
        hint: What to do about it.
    """

    def __init__(
        self,
        reason: str,
        *,
        other_format: str | None = None,
        message: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message or f"Bad sample: {reason}", hint=hint)
        self.reason = reason
        self.other_format = other_format


class ChangedSampleError(BadSampleError):
    """A file that was a sample when it was found, and is no longer."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            reason,
            message=f"`{file}` can no longer be read: {reason}",
            hint="Leave the samples as they are while they are read, then run the command again",
        )


def check_ids(
    input_ids: NDArray[np.int64],  # [seq_len]
    key: str,
) -> None:
    """Check that ids can be those of a vocabulary.

    Raises:
        BadSampleError: One is negative, or so high that it is damage.
    """
    if not len(input_ids):
        return
    if input_ids.min() < 0:
        raise BadSampleError(f"has negative ids in `{key}`")
    if input_ids.max() > MAX_TOKEN_ID:
        raise BadSampleError(f"has token id {input_ids.max():,} in `{key}`: no vocabulary has it")
