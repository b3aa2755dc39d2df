"""Attention of blocks: each reads the context before its anchor, and its own tokens.

A query at position q sees the keys of its window: those with q - k < window, and of its own block
those with k <= q, if blocks are causal, else k - q < window. So engines compute it: the window of a
block's last token begins later than that of its anchor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHORS_AT_ONCE = 64


@dataclass(frozen=True)
class BlockShape:
    """Which positions the tokens of a block see."""

    size: int  # tokens
    window: int | None = None  # None: all before the anchor
    is_causal: bool = False

    def sees_own(self, device: torch.device) -> Tensor:
        """Which tokens of its block a token sees; [size, size], bool."""
        place = torch.arange(self.size, device=device)
        ahead = place[None, :] - place[:, None]  # of the key
        seen = ahead <= 0 if self.is_causal else torch.ones_like(ahead, dtype=torch.bool)
        return seen if self.window is None else seen & (ahead.abs() < self.window)

    def sees_context(
        self,
        distances: Tensor,  # [anchors, keys], int64: from each key to the anchor, in tokens
    ) -> Tensor:
        """Which keys the tokens of blocks see; [anchors, size, keys], bool."""
        place = torch.arange(self.size, device=distances.device)[None, :, None]
        distances = distances[:, None, :]
        seen = (distances > 0).expand(-1, self.size, -1)
        return seen if self.window is None else seen & (distances + place < self.window)


@dataclass(frozen=True)
class BlockSpans:
    """Anchors and context of each document; bounds are on the host, one more than documents.

    The context of an anchor is the rows of its document up to its own, which holds the hidden
    states of the token before it.
    """

    anchor_bounds: tuple[int, ...]
    context_bounds: tuple[int, ...]
    host_anchors: tuple[int, ...]  # rows, ascending

    def ranges(self) -> Iterator[tuple[slice, slice]]:
        """Anchors of a document that are computed together, and the rows that any of them reads."""
        documents = zip(pairwise(self.anchor_bounds), pairwise(self.context_bounds), strict=True)
        for (first, last), (start, _) in documents:
            for begin in range(first, last, ANCHORS_AT_ONCE):
                end = min(begin + ANCHORS_AT_ONCE, last)
                yield slice(begin, end), slice(start, self.host_anchors[end - 1] + 1)


@dataclass(frozen=True)
class Group:
    """Blocks that are computed together, and what they see."""

    slots: slice  # of all tokens of all blocks
    rows: slice  # of the context
    seen: Tensor  # [slots, rows + slots], bool


def find_groups(
    shape: BlockShape,
    spans: BlockSpans,
    anchors: Tensor,  # [anchors], int64: the last row of the context of each
) -> list[Group]:
    """What the blocks of a sequence see, the same in every layer."""
    groups, device = [], anchors.device
    own = shape.sees_own(device)
    for some, rows in spans.ranges():
        num_anchors = some.stop - some.start
        places = torch.arange(rows.start, rows.stop, device=device)
        # The row of an anchor holds the states of the token one before it.
        context = shape.sees_context(anchors[some, None] - places + 1).flatten(0, 1)
        same = torch.eye(num_anchors, dtype=torch.bool, device=device)
        blocks = (same[:, None, :, None] & own[None, :, None, :]).flatten(2).flatten(0, 1)
        slots = slice(some.start * shape.size, some.stop * shape.size)
        groups.append(Group(slots, rows, torch.cat((context, blocks), dim=1)))
    return groups


class BlockMemory:
    """Keys and values of the context in one layer, for the blocks of one sequence.

    Args:
        groups: Of all blocks.
        key: [rows, kv_heads, head_dim]: of the context.
        value: [rows, kv_heads, head_dim]
    """

    def __init__(self, groups: Sequence[Group], key: Tensor, value: Tensor) -> None:
        self.groups, self.key, self.value = groups, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from all tokens of all blocks; [anchors*size, heads, head_dim]."""
        repeats = query.shape[1] // key.shape[1]
        outputs = [
            _attend(
                query[group.slots],
                torch.cat((self.key[group.rows], key[group.slots])),
                torch.cat((self.value[group.rows], value[group.slots])),
                group.seen,
                repeats,
            )
            for group in self.groups
        ]
        return torch.cat(outputs)


def _attend(
    query: Tensor,  # [queries, heads, head_dim]
    key: Tensor,  # [keys, kv_heads, head_dim]
    value: Tensor,
    seen: Tensor,  # [queries, keys], bool
    repeats: int,  # query heads that share a key head
) -> Tensor:
    def by_head(x: Tensor, times: int) -> Tensor:
        return x.transpose(0, 1).repeat_interleave(times, dim=0)[None]

    out = F.scaled_dot_product_attention(
        by_head(query, 1), by_head(key, repeats), by_head(value, repeats), attn_mask=seen
    )
    return out[0].transpose(0, 1)
