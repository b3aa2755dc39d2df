"""Chunks of the loss: what is scored together."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Draft logits per chunk. Each chunk reads and writes the whole gradient of the LM head: wide
# vocabularies need long chunks for speed, and short ones for memory.
MAX_LOGITS = 2**28
MAX_BLOCK_LOGITS = 2**27
MIN_ROWS, MAX_ROWS = 2048, 4096


def chunk_size(num_steps: int, draft_vocab_size: int) -> int:
    """Return the number of rows per chunk of the loss, each with all its predictions."""
    return min(max(MAX_LOGITS // (num_steps * draft_vocab_size), MIN_ROWS), MAX_ROWS)


def block_chunk_size(num_predictions: int, draft_vocab_size: int) -> int:
    """Return the number of blocks per chunk of their loss, each with all its predictions."""
    return max(MAX_BLOCK_LOGITS // (num_predictions * draft_vocab_size), 1)


def split_rows(num_rows: int, size: int) -> list[tuple[int, int]]:
    """Split rows into ranges of at most `size`, of nearly equal lengths."""
    num_chunks = -(-num_rows // size)
    bounds = [num_rows * i // max(num_chunks, 1) for i in range(num_chunks + 1)]
    return list(pairwise(bounds))


@dataclass(frozen=True)
class Pairs:
    """Rows and the steps that they go through: what is scored, by row, then by step."""

    steps: Tensor  # [pairs], int64
    targets: Tensor  # [pairs], int64: the target that a pair scores, or -1
    order: Tensor | None  # [pairs], int64: where its input is; None: the inputs are in this order
    inputs: tuple[slice, ...]  # of steps that are computed at once: where their inputs are
    num_steps: int
    first: NDArray[np.int64]  # [rows + 1], on the host: the first pair of each row
    target_bounds: tuple[NDArray[np.int64], NDArray[np.int64]]  # [rows], on the host

    def split(self, size: int) -> list[tuple[slice, slice]]:
        """Ranges of about `size` pairs, of whole rows, each with the range of its targets."""
        starts = [start for start, _ in split_rows(int(self.first[-1]), size)]
        rows = np.unique([*np.searchsorted(self.first, starts, "right") - 1, len(self.first) - 1])
        low, high = self.target_bounds
        bounds = zip(
            pairwise(self.first[rows].tolist()),
            low[rows[:-1]].tolist(),
            high[rows[1:] - 1].tolist(),
            strict=True,
        )
        return [(slice(*pairs), slice(first, last)) for pairs, first, last in bounds]
