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
from speculators_cli.core.kernels.float8 import Rounded, scale_of, store_rounded
from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.shared import SharedWeight, release

BLOCK = 2048
ROW_BLOCK = 4096  # where a program processes a row


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
        num_rows, size = len(gate_up), gate_up.shape[1] // 2
        if factor.rounds(gate_up):
            rounded = Rounded.empty(num_rows, size, gate_up.device)
            launch(_round_forward_kernel, (num_rows,))(gate_up, *rounded, **_row_options(size))
            return factor.multiply(rounded)
        activated = gate_up.new_empty(num_rows, size)
        launch(_forward_kernel, _grid(activated))(
            gate_up, activated, SIZE=size, BLOCK=BLOCK, num_warps=8
        )
        return factor.multiply(factor.prepare(activated))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,), factor = ctx.saved_tensors, release(ctx)
        rows = factor.prepare(grads[0].contiguous())
        grad = factor.multiply_back(rows)
        num_rows, size = grad.shape
        activated: tuple[Tensor, ...]
        if factor.rounds(grad):
            activated = Rounded.empty(num_rows, size, grad.device)
            launch(_round_backward_kernel, (num_rows,))(
                gate_up, grad, *activated, **_row_options(size)
            )
        else:
            launch(_backward_kernel, _grid(grad))(
                gate_up, grad, SIZE=size, BLOCK=BLOCK, num_warps=8
            )
            activated = factor.prepare(grad)
        del grad
        if ctx.needs_input_grad[1]:
            factor.add_gradient(rows, activated)
        return gate_up, None, None


def _row_options(size: int) -> dict[str, int]:
    return {"SIZE": size, "BLOCK": min(ROW_BLOCK, triton.next_power_of_2(size)), "num_warps": 8}


def _grid(activated: Tensor) -> tuple[int, int]:
    return len(activated), triton.cdiv(activated.shape[1], BLOCK)


@triton.jit
def _load_both(gate_up, i, inside, SIZE: tl.constexpr):
    gate = tl.load(gate_up + i, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(gate_up + SIZE + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale_of_row(gate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The scale of a row of activations, each rounded to the dtype of gate and up first."""
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        gate, up = _load_both(gate_up, i, i < SIZE, SIZE)
        value = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    return scale_of(tl.max(largest))


@triton.jit
def _differentiate(gate_up, gate, up, out_grad, i, inside, SIZE: tl.constexpr):
    """Replace gate and up by their gradients; return the activation, as it was."""
    open_share = tl.sigmoid(gate)
    # d silu(g) / dg = s + g s (1 - s)
    gate_grad = out_grad * up * open_share * (1.0 + gate * (1.0 - open_share))
    up_grad = out_grad * gate * open_share
    dtype = gate_up.dtype.element_ty
    tl.store(gate_up + i, gate_grad.to(dtype), mask=inside)
    tl.store(gate_up + SIZE + i, up_grad.to(dtype), mask=inside)
    return (gate * open_share * up).to(dtype)


@triton.jit
def _forward_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate, up = _load_both(gate_up + row * 2 * SIZE, i, inside, SIZE)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _round_forward_kernel(gate_up, values, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Process one row: one pass for the scale, one that rounds what the cache still holds."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * 2 * SIZE
    scale = _scale_of_row(gate_up, SIZE, BLOCK)
    tl.store(scales + row, scale)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        gate, up = _load_both(gate_up, i, i < SIZE, SIZE)
        value = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
        store_rounded(values + row * SIZE + i, value.to(tl.float32), scale, i < SIZE)


@triton.jit
def _backward_kernel(gate_up, grad, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace gate and up by their gradients, and the gradient of the activation by its value."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate_up += row * 2 * SIZE
    grad += row * SIZE
    gate, up = _load_both(gate_up, i, inside, SIZE)
    out_grad = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    value = _differentiate(gate_up, gate, up, out_grad, i, inside, SIZE)
    tl.store(grad + i, value, mask=inside)


@triton.jit
def _round_backward_kernel(gate_up, grad, values, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Process one row: one pass for the scale of the activation, one as `_backward_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * 2 * SIZE
    grad += row * SIZE
    scale = _scale_of_row(gate_up, SIZE, BLOCK)
    tl.store(scales + row, scale)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < SIZE
        gate, up = _load_both(gate_up, i, inside, SIZE)
        out_grad = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
        value = _differentiate(gate_up, gate, up, out_grad, i, inside, SIZE)
        store_rounded(values + row * SIZE + i, value.to(tl.float32), scale, inside)
