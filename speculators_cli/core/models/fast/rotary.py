"""Rotary embedding in one pass over queries or keys."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        return _turn(x, cos, sin, positions, sign=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation's transpose is the rotation back.
        return _turn(grads[0], *ctx.saved_tensors, sign=-1.0), None, None, None


def rotate(
    x: Tensor,  # [rows, heads, head_dim], each row contiguous
    rope: tuple[Tensor, Tensor],  # cosine and sine by position, [positions, 1, head_dim], float32
    positions: Tensor,  # [rows], int64
) -> Tensor:
    """Same as `layers.rotate` by the angles of each row's position."""
    out: Tensor = _Rotate.apply(x, *rope, positions)
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, sign: float) -> Tensor:
    num_rows, num_heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rotate_kernel[(num_rows,)](
        x, x.stride(0), cos, sin, positions, sign, out,
        NUM_HEADS=num_heads,
        HALF=head_dim // 2,
        HEADS_BLOCK=triton.next_power_of_2(num_heads),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    x, x_stride, cos, sin, positions, sign, out,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: each pair (i, i + head_dim/2) is turned by its angle; float32 inside."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (i < HALF)
    # Both halves of the tables hold the same angles.
    angle = tl.load(positions + row) * 2 * HALF + i
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)
    s = tl.load(sin + angle, mask=i < HALF, other=0.0) * sign
    at = head * 2 * HALF + i
    first = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + at + HALF, mask=inside, other=0.0).to(tl.float32)
    out += row * NUM_HEADS * 2 * HALF
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
