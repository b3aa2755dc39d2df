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
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels import anchor_spans
from speculators_cli.core.kernels.anchor_spans import AnchorSpans


def block_attention(
    query: Tensor,  # [anchors*size, heads, head_dim]
    context_key: Tensor,  # [rows, kv_heads, head_dim], each row contiguous
    context_value: Tensor,  # the same
    key: Tensor,  # [anchors*size, kv_heads, head_dim], each row contiguous
    value: Tensor,  # the same
    spans: AnchorSpans,
) -> Tensor:
    """Attend from all tokens of all blocks; [anchors*size, heads, head_dim]."""
    out: Tensor = _BlockAttention.apply(query, context_key, context_value, key, value, spans)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        key: Tensor,
        value: Tensor,
        spans: AnchorSpans,
    ) -> Tensor:
        query = query.contiguous()
        parts = (context_key, context_value, key, value)
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        options = _options(query, key, spans)
        _blocks_forward_kernel[_grid(query, key, spans, options)](
            query, *_with_strides(parts), spans.first, spans.limit, len(spans.first), out, lse,
            **options,
        )  # fmt: skip
        ctx.save_for_backward(query, *parts, out, lse)
        ctx.spans = spans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, *parts, out, lse = ctx.saved_tensors
        spans, grad_out = ctx.spans, grads[0].contiguous()
        context_key, _, key, _ = parts
        delta = torch.empty_like(lse)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (query.new_empty(key.shape) for _ in range(2))
        options = _options(query, key, spans)
        _blocks_backward_kernel[_grid(query, key, spans, options)](
            query, *_with_strides(parts), spans.first, spans.limit, len(spans.first),
            out, lse, grad_out, delta, grad_query, grad_key, grad_value,
            **options,
        )  # fmt: skip
        grad_context_key, grad_context_value = (
            query.new_empty(context_key.shape) for _ in range(2)
        )
        _blocks_context_kernel[(len(spans.readers), key.shape[1])](
            query, *_with_strides(parts[:2]), spans.first, spans.limit, spans.readers,
            spans.num_rows, lse, grad_out, delta, grad_context_key, grad_context_value,
            **{name: value for name, value in options.items() if name not in OWN_OPTIONS},
        )  # fmt: skip
        return grad_query, grad_context_key, grad_context_value, grad_key, grad_value, None


OWN_OPTIONS = ("IS_CAUSAL", "OWN_BLOCK")


def _with_strides(parts: tuple[Tensor, ...] | list[Tensor]) -> list[Any]:
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


@triton.jit
def _find_rows(
    begin, end, first, limit,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ANCHORS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return of the rows of a tile: anchor in the tile, token in the block, index and spans."""
    row = tl.arange(0, ROW_BLOCK)
    own = row // (SIZE * GROUP)
    slot = row % (SIZE * GROUP) // GROUP
    head = tl.program_id(1) * GROUP + row % GROUP
    anchor = begin + own
    inside = (own < ANCHORS) & (anchor < end)
    index = (anchor.to(tl.int64) * SIZE + slot) * (KV_HEADS * GROUP) + head
    # Rows that are not there see nothing.
    return (
        own, slot, index, inside,
        tl.load(first + anchor, mask=inside, other=0),
        tl.load(limit + anchor, mask=inside, other=0),
    )  # fmt: skip


@triton.jit
def _load(x, index, stride, inside, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Load rows of one head, zeros outside; [rows, head_dim]."""
    i = tl.arange(0, DIM_BLOCK)[None, :]
    at = index.to(tl.int64)[:, None] * stride + i
    return tl.load(x + at, mask=inside[:, None] & (i < HEAD_DIM), other=0.0)


@triton.jit
def _store(x, value, index, stride, inside, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    i = tl.arange(0, DIM_BLOCK)[None, :]
    at = index.to(tl.int64)[:, None] * stride + i
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside[:, None] & (i < HEAD_DIM))


@triton.jit
def _sees_context(slot, first, limit, rows, window, HAS_WINDOW: tl.constexpr):
    """Whether the rows of a tile see rows of the context; [rows, keys]."""
    rows = rows[None, :]
    seen = (rows >= first[:, None]) & (rows < limit[:, None])
    if HAS_WINDOW:
        seen = seen & (limit[:, None] - rows + slot[:, None] < window)
    return seen


@triton.jit
def _sees_own(
    own, slot, inside, window,
    SIZE: tl.constexpr,
    ANCHORS: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Whether the rows of a tile see tokens of its blocks; [rows, tokens]."""
    token = tl.arange(0, OWN_BLOCK)[None, :]
    ahead = token % SIZE - slot[:, None]
    seen = (token // SIZE == own[:, None]) & (token < ANCHORS * SIZE) & inside[:, None]
    if IS_CAUSAL:
        seen = seen & (ahead <= 0)
    if HAS_WINDOW:
        seen = seen & (tl.abs(ahead) < window)
    return seen


@triton.jit
def _context_bounds(begin, end, first, limit, window, HAS_WINDOW: tl.constexpr):
    """Bounds of the rows that any block of a tile sees."""
    lowest = tl.load(first + begin)
    if HAS_WINDOW:
        lowest = tl.maximum(lowest, tl.load(limit + begin) - window + 1)
    return lowest, tl.load(limit + end - 1)


@triton.jit(
    do_not_specialize=["num_anchors", "window"], do_not_specialize_on_alignment=["first", "limit"]
)
def _blocks_forward_kernel(
    query, context_key, context_key_stride, context_value, context_value_stride,
    key, key_stride, value, value_stride, first, limit, num_anchors, out, lse, scale, window,
    HAS_WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ANCHORS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one tile of blocks: a running softmax over own tokens, then over the context."""
    begin = tl.program_id(0) * ANCHORS
    end = tl.minimum(begin + ANCHORS, num_anchors)
    own, slot, index, inside, row_first, row_limit = _find_rows(
        begin, end, first, limit, SIZE, GROUP, KV_HEADS, ANCHORS, ROW_BLOCK
    )
    kv_head = tl.program_id(1) * HEAD_DIM
    factor = scale * 1.4426950408889634
    q = _load(query, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)

    token = begin * SIZE + tl.arange(0, OWN_BLOCK)
    is_token = token < end * SIZE
    own_k = _load(key + kv_head, token, key_stride, is_token, HEAD_DIM, DIM_BLOCK)
    own_v = _load(value + kv_head, token, value_stride, is_token, HEAD_DIM, DIM_BLOCK)
    own_seen = _sees_own(own, slot, inside, window, SIZE, ANCHORS, OWN_BLOCK, HAS_WINDOW, IS_CAUSAL)
    own_score = tl.dot(q, tl.trans(own_k), input_precision=PRECISION) * factor
    own_score = tl.where(own_seen, own_score, -float("inf"))
    # Every token sees itself; rows that are not there see nothing.
    largest = tl.maximum(tl.max(own_score, axis=1), -1e30)
    own_share = tl.exp2(own_score - largest[:, None])
    weight = tl.sum(own_share, axis=1)
    total = tl.dot(own_share.to(own_v.dtype), own_v, input_precision=PRECISION)

    lowest, highest = _context_bounds(begin, end, first, limit, window, HAS_WINDOW)
    for start in range(lowest, highest, KEY_BLOCK):
        rows = start + tl.arange(0, KEY_BLOCK)
        is_row = rows < highest
        k = _load(context_key + kv_head, rows, context_key_stride, is_row, HEAD_DIM, DIM_BLOCK)
        v = _load(context_value + kv_head, rows, context_value_stride, is_row, HEAD_DIM, DIM_BLOCK)
        seen = _sees_context(slot, row_first, row_limit, rows, window, HAS_WINDOW)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        score = tl.where(seen, score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - new_largest)
        share = tl.exp2(score - new_largest[:, None])
        weight = weight * shrink + tl.sum(share, axis=1)
        total = total * shrink[:, None]
        total += tl.dot(share.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    weight = tl.maximum(weight, 1e-30)
    _store(out, total / weight[:, None], index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
    tl.store(lse + index, largest + tl.log2(weight), mask=inside)


@triton.jit(
    do_not_specialize=["num_anchors", "window"], do_not_specialize_on_alignment=["first", "limit"]
)
def _blocks_backward_kernel(
    query, context_key, context_key_stride, context_value, context_value_stride,
    key, key_stride, value, value_stride, first, limit, num_anchors,
    out, lse, grad_out, delta, grad_query, grad_key, grad_value, scale, window,
    HAS_WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ANCHORS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one tile of blocks: gradients of its queries and of its own keys and values."""
    begin = tl.program_id(0) * ANCHORS
    end = tl.minimum(begin + ANCHORS, num_anchors)
    own, slot, index, inside, row_first, row_limit = _find_rows(
        begin, end, first, limit, SIZE, GROUP, KV_HEADS, ANCHORS, ROW_BLOCK
    )
    kv_head = tl.program_id(1) * HEAD_DIM
    factor = scale * 1.4426950408889634
    q = _load(query, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
    do = _load(grad_out, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
    o = _load(out, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta + index, row_delta, mask=inside)
    row_lse = tl.load(lse + index, mask=inside, other=0.0)

    token = begin * SIZE + tl.arange(0, OWN_BLOCK)
    is_token = token < end * SIZE
    own_k = _load(key + kv_head, token, key_stride, is_token, HEAD_DIM, DIM_BLOCK)
    own_v = _load(value + kv_head, token, value_stride, is_token, HEAD_DIM, DIM_BLOCK)
    own_seen = _sees_own(own, slot, inside, window, SIZE, ANCHORS, OWN_BLOCK, HAS_WINDOW, IS_CAUSAL)
    own_score = tl.dot(q, tl.trans(own_k), input_precision=PRECISION) * factor
    own_p = tl.where(own_seen, tl.exp2(own_score - row_lse[:, None]), 0.0)
    own_dp = tl.dot(do, tl.trans(own_v), input_precision=PRECISION)
    own_ds = (own_p * (own_dp - row_delta[:, None]) * scale).to(q.dtype)
    dq = tl.dot(own_ds, own_k, input_precision=PRECISION)
    # No other tile reads these.
    dk = tl.dot(tl.trans(own_ds), q, input_precision=PRECISION)
    dv = tl.dot(tl.trans(own_p.to(do.dtype)), do, input_precision=PRECISION)
    stride = KV_HEADS * HEAD_DIM
    _store(grad_key + kv_head, dk, token, stride, is_token, HEAD_DIM, DIM_BLOCK)
    _store(grad_value + kv_head, dv, token, stride, is_token, HEAD_DIM, DIM_BLOCK)

    lowest, highest = _context_bounds(begin, end, first, limit, window, HAS_WINDOW)
    for start in range(lowest, highest, KEY_BLOCK):
        rows = start + tl.arange(0, KEY_BLOCK)
        is_row = rows < highest
        k = _load(context_key + kv_head, rows, context_key_stride, is_row, HEAD_DIM, DIM_BLOCK)
        v = _load(context_value + kv_head, rows, context_value_stride, is_row, HEAD_DIM, DIM_BLOCK)
        seen = _sees_context(slot, row_first, row_limit, rows, window, HAS_WINDOW)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        p = tl.where(seen, tl.exp2(score - row_lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - row_delta[:, None]) * scale).to(q.dtype)
        dq += tl.dot(ds, k, input_precision=PRECISION)
    _store(grad_query, dq, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)


@triton.jit(
    do_not_specialize=["num_rows", "window"],
    do_not_specialize_on_alignment=["first", "limit", "readers"],
)
def _blocks_context_kernel(
    query, context_key, context_key_stride, context_value, context_value_stride,
    first, limit, readers, num_rows, lse, grad_out, delta, grad_key, grad_value, scale, window,
    HAS_WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ANCHORS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one tile of the context: gradients of its keys and values, from all its readers."""
    tile = tl.program_id(0)
    rows = tile * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    is_row = rows < num_rows
    kv_head = tl.program_id(1) * HEAD_DIM
    factor = scale * 1.4426950408889634
    k = _load(context_key + kv_head, rows, context_key_stride, is_row, HEAD_DIM, DIM_BLOCK)
    v = _load(context_value + kv_head, rows, context_value_stride, is_row, HEAD_DIM, DIM_BLOCK)
    dk = tl.zeros([KEY_BLOCK, DIM_BLOCK], dtype=tl.float32)
    dv = tl.zeros([KEY_BLOCK, DIM_BLOCK], dtype=tl.float32)
    end = tl.load(readers + tile * 2 + 1)
    for begin in range(tl.load(readers + tile * 2), end, ANCHORS):
        _own, slot, index, inside, row_first, row_limit = _find_rows(
            begin, end, first, limit, SIZE, GROUP, KV_HEADS, ANCHORS, ROW_BLOCK
        )
        q = _load(query, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
        do = _load(grad_out, index, HEAD_DIM, inside, HEAD_DIM, DIM_BLOCK)
        row_lse = tl.load(lse + index, mask=inside, other=0.0)
        row_delta = tl.load(delta + index, mask=inside, other=0.0)
        seen = _sees_context(slot, row_first, row_limit, rows, window, HAS_WINDOW)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        p = tl.where(seen, tl.exp2(score - row_lse[:, None]), 0.0)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - row_delta[:, None]) * scale).to(q.dtype)
        dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    stride = KV_HEADS * HEAD_DIM
    _store(grad_key + kv_head, dk, rows, stride, is_row, HEAD_DIM, DIM_BLOCK)
    _store(grad_value + kv_head, dv, rows, stride, is_row, HEAD_DIM, DIM_BLOCK)
