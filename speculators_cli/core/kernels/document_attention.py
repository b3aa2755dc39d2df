"""Causal attention over packed documents, forward only.

FlashAttention 2 launches as many tiles for each document as the longest has, in their order. Here
are only those that exist, the ones with the most keys first.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.device import move

QUERIES, KEYS = 64, 64  # of a tile, and those that it reads at a time


def find_tiles(bounds: Sequence[int], device: torch.device) -> Tensor:
    """Split documents into tiles of queries, the one with the most keys first.

    Args:
        bounds: Of the documents.
        device: Where attention is computed.

    Returns:
        [tiles, 3], int32: the first query, and the bounds of its document.
    """
    tiles = [
        (first, start, end)
        for start, end in pairwise(bounds)
        for first in range(start, end, QUERIES)
    ]
    tiles.sort(key=lambda tile: tile[1] - tile[0])
    return move(torch.tensor(tiles, dtype=torch.int32), device)


def document_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,  # [tokens, kv_heads, head_dim]
    tiles: Tensor,  # of `find_tiles`
    scale: float,
) -> Tensor:
    """Attend to the tokens of the same document up to the query's own; [tokens, heads, head_dim].

    Each head is contiguous.
    """
    _, num_heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    with torch.cuda.device_of(query):
        _attend_kernel[(num_heads, len(tiles))](
            query, key, value, out, tiles,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *out.stride()[:2],
            scale * 1.4426950408889634,
            GROUP=num_heads // key.shape[1],
            HEAD_DIM=head_dim,
            QUERIES=QUERIES,
            KEYS=KEYS,
            num_warps=4,
            num_stages=2,
        )  # fmt: skip
    return out


@triton.jit
def _add_keys(
    q, k, v, row, column, total, largest, weight, factor,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """One turn of a running softmax: `total / weight` is the output."""
    score = tl.dot(q, k)
    if IS_MASKED:
        score = tl.where(column[None, :] <= row[:, None], score, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(score, axis=1) * factor)
    share = tl.exp2(score * factor - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    weight = weight * shrink + tl.sum(share, axis=1)
    total = tl.dot(share.to(v.dtype), v, total * shrink[:, None])
    return total, new_largest, weight


@triton.jit(do_not_specialize=["factor"], do_not_specialize_on_alignment=["tiles"])
def _attend_kernel(
    query, key, value, out, tiles,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, out_head,
    factor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Process one tile of one head: keys before the tile, then its own."""
    head = tl.program_id(0)
    tile = tiles + 3 * tl.program_id(1)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = first + tl.arange(0, QUERIES)
    j = tl.arange(0, KEYS)
    i = tl.arange(0, HEAD_DIM)
    is_row = (row < end)[:, None]
    at_query = row.to(tl.int64)[:, None] * query_stride + head * query_head + i[None, :]
    q = tl.load(query + at_query, mask=is_row, other=0.0)
    key += begin.to(tl.int64) * key_stride + head // GROUP * key_head
    value += begin.to(tl.int64) * value_stride + head // GROUP * value_head
    at_key = j[None, :] * key_stride + i[:, None]
    at_value = j[:, None] * value_stride + i[None, :]
    largest = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([QUERIES], dtype=tl.float32)
    total = tl.zeros([QUERIES, HEAD_DIM], dtype=tl.float32)
    for start in range(begin, first, KEYS):
        k, v = tl.load(key + at_key), tl.load(value + at_value)
        total, largest, weight = _add_keys(
            q, k, v, row, start + j, total, largest, weight, factor, False
        )
        key += KEYS * key_stride
        value += KEYS * value_stride
    for start in range(first, tl.minimum(first + QUERIES, end), KEYS):
        is_key = start + j < end
        k = tl.load(key + at_key, mask=is_key[None, :], other=0.0)
        v = tl.load(value + at_value, mask=is_key[:, None], other=0.0)
        total, largest, weight = _add_keys(
            q, k, v, row, start + j, total, largest, weight, factor, True
        )
        key += KEYS * key_stride
        value += KEYS * value_stride
    at_out = row.to(tl.int64)[:, None] * out_stride + head * out_head + i[None, :]
    tl.store(out + at_out, (total / weight[:, None]).to(out.dtype.element_ty), mask=is_row)
