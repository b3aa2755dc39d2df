"""Gate of a feed-forward layer: silu(gate) * up, in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2048


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        num_rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, size)
        grid = (num_rows, triton.cdiv(size, BLOCK))
        _forward_kernel[grid](gate_up, out, SIZE=size, BLOCK=BLOCK, num_warps=8)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, size = grads[0].contiguous(), gate_up.shape[1] // 2
        grad_gate_up = torch.empty_like(gate_up)
        grid = (len(gate_up), triton.cdiv(size, BLOCK))
        _backward_kernel[grid](gate_up, grad, grad_gate_up, SIZE=size, BLOCK=BLOCK, num_warps=8)
        return grad_gate_up


def swiglu(
    gate_up: Tensor,  # [rows, 2*intermediate]: gate, then up
) -> Tensor:
    """Compute the gated activation, [rows, intermediate]; float32 inside."""
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


@triton.jit
def _forward_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate_up += row * 2 * SIZE
    gate = tl.load(gate_up + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gate_up, grad, grad_gate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate_up += row * 2 * SIZE
    grad_gate_up += row * 2 * SIZE
    gate = tl.load(gate_up + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    out_grad = tl.load(grad + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(gate)
    # d silu(g) / dg = s + g s (1 - s)
    gate_grad = out_grad * up * open_share * (1.0 + gate * (1.0 - open_share))
    up_grad = out_grad * gate * open_share
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + i, gate_grad.to(dtype), mask=inside)
    tl.store(grad_gate_up + SIZE + i, up_grad.to(dtype), mask=inside)
