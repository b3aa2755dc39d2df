"""Sample: the tensors of one conversation, and their validation."""

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

MAX_TOKEN_ID = 2**24 - 1  # beyond any vocabulary: counts and maps have the size of the highest id


@dataclass(frozen=True)
class SampleHeader:
    """Properties of a sample that do not need its hidden states."""

    num_tokens: int
    num_supervised_tokens: int  # number of targets
    hidden_size: int
    num_aux_layers: int
    dtype: str  # of the hidden states on disk, or their common supertype: `bfloat16`, ...
    is_normed: bool  # whether the last hidden states are after the verifier's final norm
    max_token_id: int  # -1 in an empty sample
    first_target: int  # index of the first token that is a target; -1 if there is none


@dataclass(frozen=True)
class SampleTokens:
    """A sample without its hidden states."""

    input_ids: NDArray[np.int64]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]
    hidden_size: int
    num_aux_layers: int
    dtype: str  # as in `SampleHeader`
    is_normed: bool
    fingerprint: str  # changes with the contents of the file, of which parts are read

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the conversation."""
        return len(self.input_ids)

    @property
    def max_token_id(self) -> int:
        """Return the highest id; -1 in an empty sample."""
        return int(self.input_ids.max()) if len(self.input_ids) else -1

    def header(self, alignment: Alignment = NEXT_TOKEN) -> SampleHeader:
        """Return the header of the sample."""
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
    """Hidden states [seq_len, hidden]: a tensor, or rows of a file that are read when indexed.

    Reading rows of a file raises `ChangedSampleError` if it has changed.
    """

    @property
    def dtype(self) -> "torch.dtype":
        """Any float type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of tokens, and hidden size."""

    def __len__(self) -> int:
        """Tokens."""

    def __getitem__(self, rows: "slice | Tensor", /) -> "Tensor":
        """Return rows: by a slice, by ascending indices, or by a mask."""

    def split(self, num_rows: int, /) -> Iterable["Tensor"]:
        """Yield all rows, `num_rows` at a time."""


@dataclass(frozen=True)
class Sample:
    """One conversation. Hidden states on disk are read on use from a file that is kept open."""

    input_ids: "Tensor"  # [seq_len], int64
    loss_mask: "Tensor"  # [seq_len], bool: True where the token is supervised
    aux_hidden_states: tuple[States, ...]  # aux layers of [seq_len, hidden], any float dtype
    last_hidden_states: States  # [seq_len, hidden], any float dtype
    is_normed: bool

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the conversation."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file; completes a sentence that begins with its name."""

    file: Path
    problem: str


class BadSampleError(DataError):
    """One file that is not a usable sample.

    Args:
        reason: What is wrong; completes a sentence that begins with the file's name.
        other_format: The data format it has, if not the expected one.
        message: Replaces the default message.
        hint: How to fix it.
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


def reason_of(error: BadSampleError | OSError) -> str:
    """What is wrong with a file of a sample; completes a sentence that begins with its name."""
    if isinstance(error, BadSampleError):
        return error.reason
    return f"cannot be read: {error.strerror}"


class ChangedSampleError(BadSampleError):
    """A sample's file has changed since it was found."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            reason,
            message=f"`{file}` can no longer be read: {reason}",
            hint="Rerun the command, and do not change the samples while it runs",
        )


@contextmanager
def refusing_sample() -> Iterator[None]:
    """Convert errors of a file of tensors to those of a sample."""
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
    """Check that ids are valid vocabulary ids.

    Raises:
        BadSampleError: An id is negative or implausibly high.
    """
    if not len(input_ids):
        return
    if input_ids.min() < 0:
        raise BadSampleError(f"has negative ids in `{key}`")
    if input_ids.max() > MAX_TOKEN_ID:
        raise BadSampleError(f"has token id {input_ids.max():,} in `{key}`, beyond any vocabulary")
