"""RMS norm beside a residual: the gradient of both is made in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Programs of a backward: each sums the gain's gradient over its rows, what is left is small.
NUM_PROGRAMS = 512


def rms_norm(
    x: Tensor,  # [rows, hidden]
    gain: Tensor,  # [hidden], float32
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x` normalised, and `x` itself, each [rows, hidden]; float32 inside.

    What goes on from the second result reaches `x` in the same pass as the norm's gradient.
    """
    normed, same = _RMSNorm.apply(x, gain, eps)
    return normed, same


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        num_rows, size = x.shape
        x = x.contiguous()
        out = torch.empty_like(x)
        scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(size)
        _forward_kernel[(num_rows,)](x, gain, eps, out, scale, SIZE=size, BLOCK=block, num_warps=8)
        ctx.save_for_backward(x, gain, scale)
        ctx.set_materialize_grads(False)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        grad, residual_grad = grads
        if grad is None:
            return residual_grad, None, None
        num_rows, size = x.shape
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        num_programs = min(num_rows, NUM_PROGRAMS)
        parts = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
        _backward_kernel[(num_programs,)](
            x, gain, scale, grad, grad if residual_grad is None else residual_grad.contiguous(),
            grad_x, parts, num_rows,
            HAS_RESIDUAL=residual_grad is not None,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            num_warps=8,
        )  # fmt: skip
        return grad_x, parts.sum(0), None


@triton.jit
def _forward_kernel(x, gain, eps, out, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    value = tl.load(x + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / SIZE + eps)
    g = tl.load(gain + i, mask=inside, other=0.0)
    tl.store(out + row * SIZE + i, (value * scale * g).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x, gain, scales, grad, residual_grad, grad_x, parts, num_rows,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With y = x s and s = 1/rms(x): dx = s (g dy - y mean(g dy y)); dg = sum over rows of dy y."""
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(gain + i, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        scale = tl.load(scales + row)
        y = tl.load(x + row * SIZE + i, mask=inside, other=0.0).to(tl.float32) * scale
        dy = tl.load(grad + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
        total += dy * y
        weighted = dy * g
        dx = scale * (weighted - y * (tl.sum(weighted * y) / SIZE))
        if HAS_RESIDUAL:
            dx += tl.load(residual_grad + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * SIZE + i, dx.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0) * SIZE + i, total, mask=inside)
