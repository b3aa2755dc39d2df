"""RMS norm of each head and rotary embedding in one pass over queries or keys, each way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.launch import launch

# Programs of a backward: each sums the weights' gradient over its rows; few partial sums remain.
NUM_PROGRAMS = 1024


Rope = tuple[Tensor, Tensor]  # cosine and sine by position, [positions, 1, head_dim], float32


def norm_and_rotate(
    x: Tensor,  # [rows, heads, head_dim], each row contiguous
    weight: Tensor,  # [head_dim], float32
    eps: float,
    rope: Rope,
    positions: Tensor,  # [rows], int64
) -> Tensor:
    """Apply an RMS norm to each head, then `layers.rotate`; [rows, heads, head_dim]."""
    out: Tensor = _NormAndRotate.apply(x, weight, eps, *rope, positions)
    return out


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> Tensor:
        if x.stride()[1:] != (x.shape[2], 1):
            x = x.contiguous()
        ctx.save_for_backward(x, weight, cos, sin, positions)
        ctx.eps = eps
        return turn(x, weight, eps, (cos, sin), positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, positions = ctx.saved_tensors
        grad_x = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        grad_weight = turn_back(
            x, weight, ctx.eps, (cos, sin), positions, grads[0].contiguous(), into=grad_x
        )
        return grad_x, grad_weight, None, None, None, None


def turn(x: Tensor, weight: Tensor, eps: float, rope: Rope, positions: Tensor) -> Tensor:
    """Do what `norm_and_rotate` does, without autograd."""
    num_rows, num_heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    launch(_head_norm_forward_kernel, (num_rows,))(
        x, x.stride(0), weight, eps, *rope, positions, out, **_sizes(num_heads, head_dim)
    )
    return out


def turn_back(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rope: Rope,
    positions: Tensor,
    grad: Tensor,  # [rows, heads, head_dim], contiguous
    *,
    into: Tensor,  # [rows, heads, head_dim], each row contiguous: the gradient of `x`
) -> Tensor:
    """Write the gradient of `x`, and return that of the weight."""
    num_rows, num_heads, head_dim = x.shape
    num_programs = min(num_rows, NUM_PROGRAMS)
    parts = torch.empty(num_programs, head_dim, dtype=torch.float32, device=x.device)
    launch(_head_norm_backward_kernel, (num_programs,))(
        x, x.stride(0), weight, eps, *rope, positions, grad, into, into.stride(0), parts, num_rows,
        **_sizes(num_heads, head_dim),
    )  # fmt: skip
    return parts.sum(0)


def _sizes(num_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "HALF": head_dim // 2,
        "HEADS_BLOCK": triton.next_power_of_2(num_heads),
        "HALF_BLOCK": triton.next_power_of_2(head_dim // 2),
        "num_warps": 4,
    }


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _head_norm_forward_kernel(
    x, x_stride, weight, eps, cos, sin, positions, out,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row; pairs (i, i + head_dim/2) of a head are rotated by one angle."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = i < HALF
    inside = (head < NUM_HEADS) & is_half
    at = head * 2 * HALF + i
    angle = tl.load(positions + row) * 2 * HALF + i
    c, s = _load(cos, angle, is_half), _load(sin, angle, is_half)
    x += row * x_stride
    first, second = _load(x, at, inside), _load(x, at + HALF, inside)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
    first = first * scale * _load(weight, i, is_half)
    second = second * scale * _load(weight, i + HALF, is_half)
    out += row * NUM_HEADS * 2 * HALF
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions"])
def _head_norm_backward_kernel(
    x, x_stride, weight, eps, cos, sin, positions, grad, grad_x, grad_x_stride, parts, num_rows,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate back, then with y = x s: dx = s (g dy - y mean(g dy y)); dg = sum of dy y."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = i < HALF
    inside = (head < NUM_HEADS) & is_half
    at = head * 2 * HALF + i
    first_g, second_g = _load(weight, i, is_half), _load(weight, i + HALF, is_half)
    first_total = tl.zeros([HEADS_BLOCK, HALF_BLOCK], dtype=tl.float32)
    second_total = tl.zeros([HEADS_BLOCK, HALF_BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        angle = tl.load(positions + row) * 2 * HALF + i
        c, s = _load(cos, angle, is_half), _load(sin, angle, is_half)
        own = row * NUM_HEADS * 2 * HALF + at
        turned_first, turned_second = _load(grad, own, inside), _load(grad, own + HALF, inside)
        first_dy = turned_first * c + turned_second * s
        second_dy = turned_second * c - turned_first * s
        source = row * x_stride + at
        first, second = _load(x, source, inside), _load(x, source + HALF, inside)
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
        first, second = first * scale, second * scale
        first_total += first_dy * first
        second_total += second_dy * second
        first_dy, second_dy = first_dy * first_g, second_dy * second_g
        mean = tl.sum(first_dy * first, axis=1) + tl.sum(second_dy * second, axis=1)
        mean = (mean / (2 * HALF))[:, None]
        first_dx = scale * (first_dy - first * mean)
        second_dx = scale * (second_dy - second * mean)
        to = row * grad_x_stride + at
        tl.store(grad_x + to, first_dx.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_x + to + HALF, second_dx.to(grad_x.dtype.element_ty), mask=inside)
    j = tl.arange(0, HALF_BLOCK)
    parts += tl.program_id(0) * 2 * HALF
    tl.store(parts + j, tl.sum(first_total, axis=0), mask=j < HALF)
    tl.store(parts + j + HALF, tl.sum(second_total, axis=0), mask=j < HALF)
