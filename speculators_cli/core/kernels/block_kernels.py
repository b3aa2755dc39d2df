"""Triton kernels of `block_attention`."""

import triton
import triton.language as tl


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
def blocks_forward_kernel(
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
def blocks_backward_kernel(
    query, context_key, context_key_stride, context_value, context_value_stride,
    key, key_stride, value, value_stride, first, limit, num_anchors,
    out, lse, grad_out, delta, grad_query, grad_query_stride, grad_key, grad_key_stride,
    grad_value, grad_value_stride, scale, window,
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
    _store(grad_key + kv_head, dk, token, grad_key_stride, is_token, HEAD_DIM, DIM_BLOCK)
    _store(grad_value + kv_head, dv, token, grad_value_stride, is_token, HEAD_DIM, DIM_BLOCK)

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
    num_heads: tl.constexpr = KV_HEADS * GROUP
    at = (index // num_heads) * grad_query_stride + (index % num_heads) * HEAD_DIM
    _store(grad_query, dq, at, 1, inside, HEAD_DIM, DIM_BLOCK)


@triton.jit(
    do_not_specialize=["num_rows", "window"],
    do_not_specialize_on_alignment=["first", "limit", "readers"],
)
def blocks_context_kernel(
    query, context_key, context_key_stride, context_value, context_value_stride,
    first, limit, readers, num_rows, lse, grad_out, delta,
    grad_key, grad_key_stride, grad_value, grad_value_stride, scale, window,
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
    _store(grad_key + kv_head, dk, rows, grad_key_stride, is_row, HEAD_DIM, DIM_BLOCK)
    _store(grad_value + kv_head, dv, rows, grad_value_stride, is_row, HEAD_DIM, DIM_BLOCK)
