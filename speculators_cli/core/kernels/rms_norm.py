"""RMS norm of a residual stream, fused with the addition to it; one pass each way.

Where a product is all that reads what was normalised, the pass of the backward computes it again.
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

# Programs of a backward: each sums the weights' gradient over its rows; few partial sums remain.
NUM_PROGRAMS = 512


def rms_norm(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden], float32
    eps: float,
    *,
    add: Tensor | None = None,  # [rows, hidden]
    into: Tensor | None = None,  # [rows, hidden], each row contiguous
) -> tuple[Tensor, Tensor]:
    """Return `x + add` normalised, and `x + add` itself, each [rows, hidden]; float32 inside.

    The gradient of the second result reaches `x` and `add` in the same pass as the norm's gradient.
    The first result is written into `into`, if given.
    """
    # In a list, `into` is no input for autograd: it is only the memory of the result.
    normed, summed = _RMSNorm.apply(x, add, weight, eps, [into])
    return normed, summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        add: Tensor | None,
        weight: Tensor,
        eps: float,
        room: list[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        (out,), summed, scale = _normalise(x, add, weight, eps, out=room[0])
        ctx.save_for_backward(summed, weight, scale)
        ctx.adds = add is not None
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, scale = ctx.saved_tensors
        grad, residual_grad = grads
        assert grad is not None, "the normalised result contributes to the loss"
        if grad.stride(1) != 1:
            grad = grad.contiguous()
        grad_x, grad_weight = _differentiate(
            summed, weight, scale, grad, residual_grad, restored=None
        )
        return grad_x, grad_x if ctx.adds else None, grad_weight, None, None


def norm_linear(
    x: Tensor,  # [rows, hidden]
    norm_weight: Tensor,  # [hidden], float32
    eps: float,
    weight: SharedWeight,  # [out, hidden]
    *,
    add: Tensor | None = None,  # [rows, hidden]
) -> tuple[Tensor, Tensor]:
    """Return the product of `rms_norm` and the weight, [rows, out]; and `x + add`."""
    product, summed = _NormLinear.apply(x, add, norm_weight, eps, weight.token, weight.factor)
    return product, summed


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        add: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        token: Tensor,
        factor: Factor,
    ) -> tuple[Tensor, Tensor]:
        del token
        rounds = factor.rounds(x)
        rows, summed, scale = _normalise(x, add, norm_weight, eps, rounds=rounds)
        ctx.save_for_backward(summed, norm_weight, scale)
        ctx.factor, ctx.adds = factor, add is not None
        ctx.set_materialize_grads(False)
        return factor.multiply(rows if rounds else factor.prepare(*rows)), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (summed, norm_weight, scale), factor = ctx.saved_tensors, release(ctx)
        grad, residual_grad = grads
        assert grad is not None, "the product contributes to the loss"
        rows = factor.prepare(grad.contiguous())
        grad_normed = factor.multiply_back(rows)
        rounds = factor.rounds(grad_normed)
        restored: tuple[Tensor, ...] = (grad_normed,)
        if rounds:
            restored = Rounded.empty(len(summed), summed.shape[1], summed.device)
        grad_x, grad_norm_weight = _differentiate(
            summed, norm_weight, scale, grad_normed, residual_grad, restored=restored
        )
        del grad_normed
        if ctx.needs_input_grad[4]:
            factor.add_gradient(rows, restored if rounds else factor.prepare(*restored))
        return grad_x, grad_x if ctx.adds else None, grad_norm_weight, None, None, None


def _normalise(
    x: Tensor,
    add: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    rounds: bool = False,  # to float8
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Return `x + add` normalised, `x + add`, and by what each row was scaled."""
    num_rows, size = x.shape
    x = x.contiguous()
    summed = x.view_as(x) if add is None else torch.empty_like(x)
    rows: tuple[Tensor, ...]
    if rounds:
        rows = Rounded.empty(num_rows, size, x.device)
    else:
        rows = (torch.empty_like(x) if out is None else out,)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    launch(_forward_kernel, (num_rows,))(
        x, x if add is None else add.contiguous(), weight, eps,
        summed, rows[0], rows[0].stride(0), rows[-1], scale,
        HAS_ADD=add is not None,
        ROUNDS=rounds,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )  # fmt: skip
    return rows, summed, scale


def _differentiate(
    summed: Tensor,
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,  # [rows, hidden], each row contiguous
    residual_grad: Tensor | None,
    *,
    restored: tuple[Tensor, ...] | None,  # what was normalised, rounded or not, if wanted
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `summed` and of the weight."""
    num_rows, size = summed.shape
    grad_x = torch.empty_like(summed)
    normed = (grad,) if restored is None else restored
    num_programs = min(num_rows, NUM_PROGRAMS)
    parts = torch.empty(num_programs, size, dtype=torch.float32, device=summed.device)
    launch(_backward_kernel, (num_programs,))(
        summed, weight, scale, grad, grad.stride(0),
        grad if residual_grad is None else residual_grad.contiguous(),
        grad_x, parts, num_rows, normed[0], normed[0].stride(0), normed[-1],
        HAS_RESIDUAL=residual_grad is not None,
        RESTORES=restored is not None,
        ROUNDS=isinstance(restored, Rounded),
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8,
    )  # fmt: skip
    return grad_x, parts.sum(0)


@triton.jit
def _store_row(to, value, to_scale, inside, ROUNDS: tl.constexpr):
    if ROUNDS:
        value = value.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(value)))
        tl.store(to_scale, scale)
        store_rounded(to, value, scale, inside)
    else:
        tl.store(to, value, mask=inside)


@triton.jit
def _forward_kernel(
    x, add, weight, eps, summed, out, out_stride, out_scales, scales,
    HAS_ADD: tl.constexpr,
    ROUNDS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    value = tl.load(x + row * SIZE + i, mask=inside, other=0.0)
    if HAS_ADD:
        added = tl.load(add + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
        # Rounded first: the backward reads the rounded values.
        value = (value.to(tl.float32) + added).to(summed.dtype.element_ty)
        tl.store(summed + row * SIZE + i, value, mask=inside)
    value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / SIZE + eps)
    g = tl.load(weight + i, mask=inside, other=0.0)
    # Rounded to the dtype of the rows first, as where it is stored.
    normed = (value * scale * g).to(summed.dtype.element_ty)
    _store_row(out + row * out_stride + i, normed, out_scales + row, inside, ROUNDS)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x, weight, scales, grad, grad_stride, residual_grad, grad_x, parts, num_rows,
    restored, restored_stride, restored_scales,
    HAS_RESIDUAL: tl.constexpr,
    RESTORES: tl.constexpr,
    ROUNDS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With y = x s and s = 1/rms(x): dx = s (g dy - y mean(g dy y)); dg = sum over rows of dy y."""
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(weight + i, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        scale = tl.load(scales + row)
        y = tl.load(x + row * SIZE + i, mask=inside, other=0.0).to(tl.float32) * scale
        dy = tl.load(grad + row * grad_stride + i, mask=inside, other=0.0).to(tl.float32)
        total += dy * y
        weighted = dy * g
        dx = scale * (weighted - y * (tl.sum(weighted * y) / SIZE))
        if HAS_RESIDUAL:
            dx += tl.load(residual_grad + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * SIZE + i, dx.to(grad_x.dtype.element_ty), mask=inside)
        if RESTORES:
            normed = (y * g).to(grad.dtype.element_ty)
            to = restored + row * restored_stride + i
            _store_row(to, normed, restored_scales + row, inside, ROUNDS)
    tl.store(parts + tl.program_id(0) * SIZE + i, total, mask=inside)
