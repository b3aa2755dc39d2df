"""Spans: which queries of a packed sequence attend to which of its keys.

A kernel takes the queries of a document as one range that ends where the document ends. The active
rows of a document are therefore laid out in the range from the first of them to the document's end:
a prompt before them costs nothing, gaps between them are filled with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.kernels.device import move


@dataclass(frozen=True)
class Spans:
    """Queries and keys of each document: the last `q` of its `k` positions attend, causally."""

    query_bounds: tuple[int, ...]  # start of each document's queries, and the end of the last
    key_bounds: tuple[int, ...]  # the same for its keys
    query_offsets: Tensor  # `query_bounds`, int32, on the device
    key_offsets: Tensor
    places: Tensor | None  # the place of each row; None: there are no gaps
    sources: Tensor | None  # the row at each place, or -1

    @classmethod
    def of_documents(cls, bounds: Sequence[int], device: torch.device) -> "Spans":
        """Build spans in which every position is a query."""
        offsets = _offsets(bounds, device)
        return cls(tuple(bounds), tuple(bounds), offsets, offsets, None, None)

    @classmethod
    def of_rows(
        cls, bounds: Sequence[int], rows: NDArray[np.int64], device: torch.device
    ) -> "Spans":
        """Build spans in which only these positions are queries, in any order."""
        query_bounds, places = [0], []
        ascending = np.sort(rows)
        for start, stop in pairwise(bounds):
            own = ascending[np.searchsorted(ascending, start) : np.searchsorted(ascending, stop)]
            length = stop - int(own[0]) if len(own) else 0
            places.append(own - (stop - length) + query_bounds[-1])
            query_bounds.append(query_bounds[-1] + length)
        placed = np.concatenate(places)[np.searchsorted(ascending, rows)]
        offsets = _offsets(query_bounds, device), _offsets(bounds, device)
        if np.array_equal(placed, np.arange(query_bounds[-1])):
            return cls(tuple(query_bounds), tuple(bounds), *offsets, None, None)
        sources = np.full(query_bounds[-1], -1)
        sources[placed] = np.arange(len(placed))
        return cls(
            tuple(query_bounds),
            tuple(bounds),
            *offsets,
            move(torch.from_numpy(placed), device),
            move(torch.from_numpy(sources), device),
        )

    @property
    def longest_query(self) -> int:
        """Number of queries of the document with the most."""
        return max(stop - start for start, stop in pairwise(self.query_bounds))

    @property
    def longest_key(self) -> int:
        """Number of keys of the longest document."""
        return max(stop - start for start, stop in pairwise(self.key_bounds))


def document_bounds(lengths: Sequence[int], seq_len: int) -> tuple[int, ...]:
    """Return the start of each document, and the end of the last; padding counts as one."""
    padding = seq_len - sum(lengths)
    return tuple(accumulate((*lengths, padding) if padding else lengths, initial=0))


def _offsets(bounds: Sequence[int], device: torch.device) -> Tensor:
    return move(torch.tensor(bounds, dtype=torch.int32), device)
