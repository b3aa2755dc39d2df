"""Frequencies of verifier tokens among the targets, counted in samples or read from a file."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.sample import SampleTokens
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import replacing
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.errors import TorchFileError

FILE_NAME = "token_freq.pt"
MAX_TOTAL = 2**63 - 1  # maximum of an int64; counts are added up
HELD_BACK_TOKENS = 2**20  # per update: each costs a pass over the vocabulary


class TokenCounts:
    """Counts the tokens of samples.

    Args:
        vocab_size: Vocabulary size of the verifier; None: derived from the highest id.
        all_tokens: Count every token, not only supervised ones.
    """

    def __init__(self, vocab_size: int | None, *, all_tokens: bool = False) -> None:
        self.vocab_size = vocab_size
        self.all_tokens = all_tokens
        self._counts = np.zeros(vocab_size or 0, dtype=np.int64)
        self._held_back: list[NDArray[np.integer[Any]]] = []
        self._num_held_back = 0

    def add(self, tokens: SampleTokens) -> None:
        """Count the tokens of a sample, or its targets.

        Raises:
            DataError: A token is beyond the verifier's vocabulary.
        """
        vocab_size = self.vocab_size
        if vocab_size is not None and tokens.max_token_id >= vocab_size:
            raise DataError(
                f"The samples have token ids up to {tokens.max_token_id:,} or more, the "
                f"verifier has {vocab_size:,} tokens",
                hint="Pass the verifier that the samples were captured from",
            )
        self.add_ids(tokens.input_ids, tokens.loss_mask)

    def add_ids(
        self,
        input_ids: NDArray[np.integer[Any]],  # [seq_len], within the vocabulary
        loss_mask: NDArray[np.bool_],  # [seq_len]
    ) -> None:
        """Count ids, or the targets among them."""
        targets = NEXT_TOKEN.find_targets(loss_mask)
        self._held_back.append(input_ids if self.all_tokens else input_ids[targets])
        self._num_held_back += len(self._held_back[-1])
        if self._num_held_back >= HELD_BACK_TOKENS:
            self._count()

    def total(self) -> NDArray[np.int64]:
        """Return the counts so far; [vocab]."""
        self._count()
        return self._counts

    def _count(self) -> None:
        if self._held_back:
            ids = np.concatenate(self._held_back)
            counts = np.bincount(ids, minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts = counts
        self._held_back, self._num_held_back = [], 0


def write_token_freq(counts: NDArray[np.int64], file: Path) -> None:
    """Write a `token_freq.pt`: a dict of token id to count, without zeros."""
    ids = np.flatnonzero(counts).tolist()
    content = BytesIO()
    torch.save(dict(zip(ids, counts[ids].tolist(), strict=True)), content)
    # Not by torch itself, whose errors do not tell a full disk.
    with replacing(file) as temporary:
        temporary.write_bytes(content.getvalue())


def read_token_freq(files: Sequence[Path], vocab_size: int) -> NDArray[np.int64]:
    """Read and add up `token_freq.pt` files; no code of them is run.

    Returns:
        [vocab], int64.

    Raises:
        SettingsError: A file is invalid, or has tokens beyond the verifier's vocabulary; or the
            counts are too large to be added up.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = 0
    for file in files:
        for token_id, count in _read_table(file).items():
            if not 0 <= token_id < vocab_size:
                raise SettingsError(
                    f"`--token-freq-path`: `{file}` counts token {token_id:,}, the verifier has "
                    f"{vocab_size:,} tokens",
                    hint="Pass the verifier whose tokens were counted",
                )
            total += count
            if total > MAX_TOTAL:
                raise SettingsError(
                    f"`--token-freq-path`: the sum of the counts exceeds {MAX_TOTAL:,} with "
                    f"`{file}`, which counts token {token_id:,} {count:,} times",
                    hint="Count the tokens again, since the counts are implausibly high",
                )
            counts[token_id] += count
    return counts


def _read_table(file: Path) -> dict[int, int]:
    reason = "is not a table of token counts"
    try:
        with Archive(file) as archive:
            content = archive.content
    except TorchFileError as error:
        content, reason = None, error.reason
    except OSError as error:
        content, reason = None, f"cannot be read: {error.strerror}"
    if not isinstance(content, dict) or not all(
        type(key) is int and type(value) is int and value >= 0 for key, value in content.items()
    ):
        raise SettingsError(
            f"`--token-freq-path`: `{file}` {reason}",
            hint="Pass a file with a dict of token id to count, written by `torch.save`",
        )
    return content
