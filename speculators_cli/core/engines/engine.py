"""What the jobs need of a running verifier: answers to prompts, and hidden states of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer."""

    ids: Sequence[int]
    seed: int  # of the answer's random numbers; independent of the other prompts


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One answer, exactly as the engine generated it."""

    index: int  # of its prompt
    ids: Sequence[int]  # including the end token, if there is one
    is_truncated: bool  # whether it reached `max_new_tokens` before an end token


class Answerer(Protocol):
    """Generates answers of the verifier."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Everything that its answers depend on besides verifier, prompts and sampling."""

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Answer prompts; answers are yielded as they are finished, in any order.

        Raises:
            MachineError: The engine has failed, or lost an answer.
        """

    def close(self) -> None:
        """Release its memory and processes."""


@dataclass(frozen=True)
class Packed:
    """Documents of the verifier's tokens, end to end."""

    input_ids: Tensor  # [tokens], int64
    lengths: Sequence[int]  # tokens of each document
    rows: Tensor  # [rows], int64, ascending: tokens to return last hidden states of
    # [aux rows], int64, ascending: tokens to return aux hidden states of; None: all.
    aux_rows: Tensor | None = None
    position_ids: Tensor | None = None  # [tokens], int64: from 0 in each document; None: computed
    num_zero_rows: int = 0  # rows of zeros after the aux hidden states


def aux_rows_of(packed: Packed) -> Tensor:
    """Return the tokens to return aux hidden states of."""
    if packed.aux_rows is None:
        return torch.arange(len(packed.input_ids), device=packed.input_ids.device)
    return packed.aux_rows


@dataclass(frozen=True)
class CapturedStates:
    """Hidden states of packed documents."""

    # [aux rows + zero rows, aux*hidden]: the output after k layers, for each layer id k, ascending.
    aux: Tensor
    last: Tensor  # [rows, hidden]: before the final norm


class Capturer(Protocol):
    """Computes hidden states of the verifier."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Everything that its hidden states depend on besides verifier, tokens and layer ids."""

    def capture(self, packed: Packed) -> CapturedStates:
        """Compute the hidden states of packed documents, none of which sees another.

        The result is on the engine's device, and may still be in computation there.

        Raises:
            MachineError: The engine has failed, or has computed other tokens.
        """

    def close(self) -> None:
        """Release its memory and processes."""
