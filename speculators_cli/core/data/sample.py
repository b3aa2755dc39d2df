"""Sample: the tensors of one conversation, and what makes it valid."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import NEXT_TOKEN, Alignment
from speculators_cli.core.errors import DataError
from speculators_cli.core.torch_file.errors import ChangedFileError, TorchFileError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TOKEN_ID = 2**24 - 1  # far beyond any vocabulary: counts and maps are as large as the highest


@dataclass(frozen=True)
class SampleHeader:
    """What is known of a sample without reading its hidden states."""

    num_tokens: int
    num_supervised_tokens: int  # those that are targets
    hidden_size: int
    num_aux_layers: int
    dtype: str  # of the hidden states on disk, or one that holds all of theirs: `bfloat16`, ...
    is_normed: bool  # whether the last hidden states are after the verifier's final norm
    max_token_id: int  # -1 in an empty sample
    first_target: int  # index of the first token that is a target; -1: none


@dataclass(frozen=True)
class SampleTokens:
    """A sample without its hidden states."""

    input_ids: NDArray[np.int64]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]
    hidden_size: int
    num_aux_layers: int
    dtype: str  # as in `SampleHeader`
    is_normed: bool
    fingerprint: str  # changes with the contents of the file, which was not read whole

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation."""
        return len(self.input_ids)

    @property
    def max_token_id(self) -> int:
        """The highest id; -1 in an empty sample."""
        return int(self.input_ids.max()) if len(self.input_ids) else -1

    def header(self, alignment: Alignment = NEXT_TOKEN) -> SampleHeader:
        """The header of the sample."""
        targets = alignment.find_targets(self.loss_mask)
        return SampleHeader(
            num_tokens=self.num_tokens,
            num_supervised_tokens=len(targets),
            hidden_size=self.hidden_size,
            num_aux_layers=self.num_aux_layers,
            dtype=self.dtype,
            is_normed=self.is_normed,
            max_token_id=self.max_token_id,
            first_target=int(targets[0]) if len(targets) else -1,
        )


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


@contextmanager
def refusing_sample() -> Iterator[None]:
    """Turn what is wrong with a file of tensors into what is wrong with a sample."""
    try:
        yield
    except ChangedFileError as error:
        raise ChangedSampleError(error.file, error.reason) from None
    except TorchFileError as error:
        raise BadSampleError(error.reason) from None


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
