"""Rotary embedding in one pass over queries or keys, fused with their layout for attention."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.spans import Spans


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, spans: Spans | None
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.spans = spans
        sources = None if spans is None else spans.sources
        return _turn(x, cos, sin, positions, sources=sources, is_back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The transpose of a rotation is its inverse.
        places = None if ctx.spans is None else ctx.spans.places
        grad = _turn(grads[0], *ctx.saved_tensors, sources=places, is_back=True)
        return grad, None, None, None, None


def rotate(
    x: Tensor,  # [rows, heads, head_dim], each row contiguous
    rope: tuple[Tensor, Tensor],  # cosine and sine by position, [positions, 1, head_dim], float32
    positions: Tensor,  # [rows], int64
    *,
    spans: Spans | None = None,
) -> Tensor:
    """Apply `layers.rotate` with the angles of each row's position.

    Returns:
        [rows, heads, head_dim]; with `spans`, [queries, heads, head_dim]: each row at its place in
            the spans, zeros in the gaps, whose gradient is ignored.
    """
    out: Tensor = _Rotate.apply(x, *rope, positions, spans)
    return out


def _turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    sources: Tensor | None,  # the row of `x` to read, or -1; None: its own
    is_back: bool,
) -> Tensor:
    num_rows, num_heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):
        x = x.contiguous()
    if sources is not None:
        num_rows = len(sources)
    out = x.new_empty(num_rows, num_heads, head_dim)
    launch(_rotate_kernel, (num_rows,))(
        x, x.stride(0), cos, sin, positions, positions if sources is None else sources, out,
        HAS_SOURCES=sources is not None,
        IS_BACK=is_back,
        NUM_HEADS=num_heads,
        HALF=head_dim // 2,
        HEADS_BLOCK=triton.next_power_of_2(num_heads),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=["positions", "sources"])
def _rotate_kernel(
    x, x_stride, cos, sin, positions, sources, out,
    HAS_SOURCES: tl.constexpr,
    IS_BACK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row: rotate each pair (i, i + head_dim/2) by its angle; float32 inside."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_SOURCES:
        source = tl.load(sources + row)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (i < HALF)
    at = head * 2 * HALF + i
    out += row * NUM_HEADS * 2 * HALF
    if source < 0:
        nothing = tl.zeros([HEADS_BLOCK, HALF_BLOCK], dtype=tl.float32).to(out.dtype.element_ty)
        tl.store(out + at, nothing, mask=inside)
        tl.store(out + at + HALF, nothing, mask=inside)
    else:
        # Positions are indexed by row, as before the layout.
        position = tl.load(positions + (row if IS_BACK else source))
        # Both halves of the tables have the same angles.
        angle = position * 2 * HALF + i
        c = tl.load(cos + angle, mask=i < HALF, other=0.0)
        s = tl.load(sin + angle, mask=i < HALF, other=0.0)
        if IS_BACK:
            s = -s
        x += source * x_stride
        first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
