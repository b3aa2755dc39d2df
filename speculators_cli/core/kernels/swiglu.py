"""Gate of a feed-forward layer, silu(gate) * up, and the product that reads it.

The gated activation is half as large as what it is computed from, and as cheap to compute again as
to read: the backward does so, in the pass that computes the gradients of gate and up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.factors import Factor
from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.shared import SharedWeight, release

BLOCK = 2048


def gated_linear(
    gate_up: Tensor,  # [rows, 2*intermediate], contiguous: both halves; the backward overwrites it
    weight: SharedWeight,  # [out, intermediate]
) -> Tensor:
    """Multiply the gated activation by the weight; [rows, out]. The activation is in float32."""
    out: Tensor = _GatedLinear.apply(gate_up, weight.token, weight.factor)
    return out


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, token: Tensor, factor: Factor) -> Tensor:
        del token
        assert gate_up.is_contiguous(), "a product's result"
        ctx.save_for_backward(gate_up)
        ctx.factor = factor
        activated = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        launch(_forward_kernel, _grid(activated))(
            gate_up, activated, SIZE=activated.shape[1], BLOCK=BLOCK, num_warps=8
        )
        return factor.multiply(factor.prepare(activated))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,), factor = ctx.saved_tensors, release(ctx)
        rows = factor.prepare(grads[0].contiguous())
        grad = factor.multiply_back(rows)
        launch(_backward_kernel, _grid(grad))(
            gate_up, grad, SIZE=grad.shape[1], BLOCK=BLOCK, num_warps=8
        )
        grad_gate_up, activated = gate_up, grad
        if ctx.needs_input_grad[1]:
            factor.add_gradient(rows, factor.prepare(activated))
        return grad_gate_up, None, None


def _grid(activated: Tensor) -> tuple[int, int]:
    return len(activated), triton.cdiv(activated.shape[1], BLOCK)


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
def _backward_kernel(gate_up, grad, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace gate and up by their gradients, and the gradient of the activation by its value."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate_up += row * 2 * SIZE
    grad += row * SIZE
    gate = tl.load(gate_up + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    out_grad = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(gate)
    # d silu(g) / dg = s + g s (1 - s)
    gate_grad = out_grad * up * open_share * (1.0 + gate * (1.0 - open_share))
    up_grad = out_grad * gate * open_share
    dtype = gate_up.dtype.element_ty
    tl.store(gate_up + i, gate_grad.to(dtype), mask=inside)
    tl.store(gate_up + SIZE + i, up_grad.to(dtype), mask=inside)
    tl.store(grad + i, (gate * open_share * up).to(grad.dtype.element_ty), mask=inside)
