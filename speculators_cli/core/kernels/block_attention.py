r"""Attention of blocks over the context before their anchors and their own tokens.

A program computes a tile of whole blocks, for the query heads that share a key head: the rows of a
tile are (anchor, token of the block, head of the group), all of which read the same keys. With
scores :math:`s_{ij}`, outputs :math:`o_i` and :math:`L_i = \log \sum_j e^{s_{ij}}`, the backward
uses :math:`p_{ij} = e^{s_{ij} - L_i}` and :math:`ds_{ij} = p_{ij} (do_i \cdot v_j - o_i \cdot
do_i)`: once per tile of blocks, for the gradients of queries and of the blocks' own keys, and once
per tile of context rows, for theirs.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels import anchor_spans
from speculators_cli.core.kernels.anchor_spans import AnchorSpans
from speculators_cli.core.kernels.block_context import LayerContext
from speculators_cli.core.kernels.block_kernels import (
    blocks_backward_kernel,
    blocks_context_kernel,
    blocks_forward_kernel,
)
from speculators_cli.core.kernels.head_norm import HeadGroups, HeadNorm, Rope
from speculators_cli.core.kernels.launch import launch


def block_attention(
    projected: Tensor,  # [anchors*size, (heads + 2*kv_heads)*head_dim]: queries, keys, values
    context: LayerContext,
    gains: Tensor,  # [2, head_dim], float32: weights of the norms of queries and of keys
    eps: float,
    rope: Rope,
    positions: Tensor,  # [anchors*size], int64
    spans: AnchorSpans,
) -> Tensor:
    """Attend from all tokens of all blocks; [anchors*size, heads, head_dim].

    Queries and keys of the blocks are normalised and rotated here, and again in the backward.
    """
    _, kv_heads, head_dim = context.key.shape
    num_heads = projected.shape[1] // head_dim - 2 * kv_heads
    norm = HeadNorm(HeadGroups(num_heads, kv_heads, 2), gains, eps, rope, positions)
    out: Tensor = _BlockAttention.apply(projected, gains, context.token, norm, context, spans)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        gains: Tensor,
        token: Tensor,
        norm: HeadNorm,
        context: LayerContext,
        spans: AnchorSpans,
    ) -> Tensor:
        del gains, token
        query, key = norm.apply(projected)
        _, _, value = _split_heads(projected, norm)
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        options = _options(query, key, spans)
        launch(blocks_forward_kernel, _grid(query, key, spans, options))(
            query, *_with_strides(context.key, context.value, key, value),
            spans.first, spans.limit, len(spans.first), out, lse,
            **options,
        )  # fmt: skip
        ctx.save_for_backward(projected, context.key, context.value, out, lse)
        ctx.norm, ctx.gradient, ctx.index, ctx.spans = norm, context.gradient, context.index, spans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projected, context_key, context_value, out, lse = ctx.saved_tensors
        norm, spans = ctx.norm, ctx.spans
        grad_out = grads[0].contiguous()
        query, key = norm.apply(projected)
        _, _, value = _split_heads(projected, norm)
        grad_projected = torch.empty_like(projected)
        delta = torch.empty_like(lse)
        options = _options(query, key, spans)
        launch(blocks_backward_kernel, _grid(query, key, spans, options))(
            query, *_with_strides(context_key, context_value, key, value),
            spans.first, spans.limit, len(spans.first), out, lse, grad_out, delta,
            *_with_strides(*_split_heads(grad_projected, norm)),
            **options,
        )  # fmt: skip
        launch(blocks_context_kernel, (len(spans.readers), key.shape[1]))(
            query, *_with_strides(context_key, context_value), spans.first, spans.limit,
            spans.readers, spans.num_rows, lse, grad_out, delta,
            *_with_strides(*ctx.gradient.of_layer(ctx.index, context_key)),
            **{name: value for name, value in options.items() if name not in OWN_OPTIONS},
        )  # fmt: skip
        grad_gains = norm.differentiate(projected, grad_projected)
        return grad_projected, grad_gains, None, None, None, None


def _split_heads(projected: Tensor, norm: HeadNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; each [rows, heads, head_dim], each row contiguous."""
    num_heads, kv_heads = norm.groups.sizes
    heads = projected.view(len(projected), num_heads + 2 * kv_heads, -1)
    query, key, value = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    return query, key, value


OWN_OPTIONS = ("IS_CAUSAL", "OWN_BLOCK")


def _with_strides(*parts: Tensor) -> list[Any]:
    """Each tensor, and from row to row."""
    head_dim = parts[0].shape[-1]
    assert all(part.stride()[1:] == (head_dim, 1) for part in parts), "rows are contiguous"
    return [x for part in parts for x in (part, part.stride(0))]


def _options(query: Tensor, key: Tensor, spans: AnchorSpans) -> dict[str, Any]:
    _, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    tile_rows = anchor_spans.TILE_ROWS
    if query.dtype == torch.float32:
        num_rows = anchor_spans.FLOAT32_BLOCKS * spans.size * group
        tile_rows = max(triton.next_power_of_2(num_rows), 16)
    num_anchors = tile_rows // (spans.size * group)
    return {
        "scale": head_dim**-0.5,
        "window": spans.window or 0,
        "HAS_WINDOW": spans.window is not None,
        "IS_CAUSAL": spans.is_causal,
        "SIZE": spans.size,
        "GROUP": group,
        "KV_HEADS": key.shape[1],
        "HEAD_DIM": head_dim,
        "ANCHORS": num_anchors,
        "ROW_BLOCK": tile_rows,
        "KEY_BLOCK": anchor_spans.TILE_KEYS,
        "OWN_BLOCK": max(triton.next_power_of_2(num_anchors * spans.size), 16),
        "DIM_BLOCK": max(triton.next_power_of_2(head_dim), 16),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": 8 if query.element_size() < 4 else 4,
        "num_stages": 2 if query.element_size() < 4 else 1,
    }


def _grid(
    query: Tensor, key: Tensor, spans: AnchorSpans, options: dict[str, Any]
) -> tuple[int, int]:
    num_anchors = len(query) // spans.size
    return triton.cdiv(num_anchors, options["ANCHORS"]), key.shape[1]
