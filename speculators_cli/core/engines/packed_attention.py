"""Attention over packed documents inside a transformers model, without a mask.

Registered under a name for which transformers has no mask function, so that it builds no mask.
Which tokens are one document is told by `packing`, not by arguments: families differ in what they
pass on to their attention, and a compiled layer must not depend on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from speculators_cli.core.kernels.causal_attention import can_use_flash
from speculators_cli.core.kernels.device import move
from speculators_cli.core.kernels.support import why_not_fast

NAME = "speculators_packed"
TILED_HEAD_DIMS = (64, 128)  # for which Triton's attention was measured
QUERIES_AT_ONCE = 1024  # of the plain formula, which stores scores

_flash_forward = torch.ops.aten._flash_attention_forward  # noqa: SLF001


class Packing:
    """The documents of one forward pass.

    Args:
        lengths: Tokens of each document.
        device: Where attention is computed.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.bounds = (0, *accumulate(lengths))
        self.offsets = move(torch.tensor(self.bounds, dtype=torch.int32), device)
        # With one token per document, the kernel would assume that no document has fewer.
        self.longest = max(2, *lengths)
        self.num_calls = 0  # of the attention
        self.has_window = False  # whether a call had a sliding window
        self.tiles: Tensor | None = None  # of queries, for attention that takes tiles


_current: Packing | None = None


@contextmanager
def packing(documents: Packing) -> Iterator[Packing]:
    """Compute attention over these documents within the block."""
    global _current
    _current = documents
    try:
        yield documents
    finally:
        _current = None


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,  # [1, kv_heads, tokens, value_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [heads]: attention sinks
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within documents, causally; [1, tokens, heads, value_dim]."""
    if attention_mask is not None:
        raise NotImplementedError("the verifier passes a mask to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.speculators.packed_attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        scale, sliding_window, softcap, s_aux,
    )  # fmt: skip
    return out[None], None


@torch.library.custom_op("speculators::packed_attention", mutates_args=())
def _packed_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,  # [tokens, kv_heads, value_dim]
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention as one operation of a compiled layer; [tokens, heads, value_dim]."""
    documents = _current
    assert documents is not None, "called within `packing`"
    documents.num_calls += 1
    documents.has_window |= window is not None
    is_plain_head = query.shape[-1] == value.shape[-1] and softcap is None
    if is_plain_head and can_use_flash(query.device, query.dtype, query.shape[-1]):
        if window is None and sinks is None and _are_tiles_faster(query.device, query.shape[-1]):
            return _attend_in_tiles(query, key, value, scale, documents)
        return _flash(query, key, value, scale, window, sinks, documents)
    parts = [
        _attend(query[a:b], key[a:b], value[a:b], scale, window, softcap, sinks)
        for a, b in pairwise(documents.bounds)
    ]
    return torch.cat(parts)


@_packed_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,
    scale: float,  # noqa: ARG001
    window: int | None,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    sinks: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


@cache
def _are_tiles_faster(device: torch.device, head_dim: int) -> bool:
    """Whether Triton's attention is faster than FlashAttention 2, which was made for older GPUs."""
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and head_dim in TILED_HEAD_DIMS and why_not_fast(device) is None


def _attend_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Packing
) -> Tensor:
    """Triton's attention; all layers share the tiles."""
    from speculators_cli.core.kernels.document_attention import document_attention, find_tiles

    if documents.tiles is None:
        documents.tiles = find_tiles(documents.bounds, query.device)
    return document_attention(query, key, value, documents.tiles.to(query.device), scale)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    documents: Packing,
) -> Tensor:
    """FlashAttention; a sink is one more score, merged through the log-sum-exp."""
    offsets, longest = documents.offsets, documents.longest
    out: Tensor
    out, lse, *_ = _flash_forward(
        query, key, value, offsets, offsets, longest, longest, 0.0, True, False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    if sinks is not None:
        share = torch.sigmoid(lse - sinks[:, None].float())  # [heads, tokens]
        out = (out * share.T[..., None]).to(out.dtype)
    return out


def _attend(
    query: Tensor,  # [seq_len, heads, head_dim]
    key: Tensor,  # [seq_len, kv_heads, head_dim]
    value: Tensor,  # [seq_len, kv_heads, value_dim]
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [heads]
) -> Tensor:
    """The formula for one document, some queries at a time; [seq_len, heads, value_dim]."""
    length, num_heads, _ = query.shape
    is_short = window is None or length <= window
    if is_short and softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1),
            is_causal=True, scale=scale, enable_gqa=num_heads != key.shape[1],
        )  # fmt: skip
        return out.transpose(0, 1).contiguous()
    group = num_heads // key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
    positions = torch.arange(length, device=query.device)
    parts = []
    for queries in positions.split(QUERIES_AT_ONCE):
        scores = torch.einsum("qhd,khd->hqk", query[queries], keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = queries[:, None] - positions
        is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(is_hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores.dtype)[:, None, None].expand(-1, len(queries), 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., :length].to(values.dtype)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


AttentionInterface.register(NAME, packed_attention)
