"""Tensors shared by all TTT steps: their gradients are summed in one buffer, without copies.

Both kinds depend on a token: a scalar without a value. Each use takes the token and returns no
gradient for it, but autograd still runs the node that created it after the last of them; that node
returns the finished sum.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.arrival import wait_for_arrival
from speculators_cli.core.kernels.factors import Factor, Float8Factor, GradientSum, PlainFactor
from speculators_cli.core.kernels.rows import add_rows, pick_rows


class SharedWeight:
    """Stacked weights of one input, cast once for all uses.

    They are read at the first use, so weights that other ranks still send can arrive meanwhile, and
    a backward completes their gradient right after that use, before anything that came earlier.

    Args:
        weights: Each [out, in], float32 or the compute dtype.
        dtype: The compute dtype.
        norm_weight: [in], float32, of a norm before the weights: folded into them, where its
            gradient costs one pass over theirs. Applied to the rows, it would cost a GEMM.
        in_float8: Whether products are computed in float8, if their sizes permit.
        is_kept: Whether the cast weights are kept until the backward; in float8, they are.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        norm_weight: Tensor | None = None,
        in_float8: bool = False,
        is_kept: bool = True,
    ) -> None:
        self.weights, self.dtype, self.norm_weight = weights, dtype, norm_weight
        self.in_float8, self.is_kept = in_float8, is_kept

    @cached_property
    @torch.no_grad()
    def factor(self) -> Factor:
        """The weights as products multiply them."""
        wait_for_arrival(self.weights)
        own = (self.weights, self.norm_weight, self.dtype)
        # Parts of a weight have no dtype of their gradient.
        first = self.weights[0]
        gradient_dtype = (first.grad_dtype if first.is_leaf else None) or torch.float32
        if self.in_float8 and Float8Factor.is_possible(self.weights):
            return Float8Factor(*own, gradient_dtype=gradient_dtype)
        return PlainFactor(*own, gradient_dtype=gradient_dtype, is_kept=self.is_kept)

    @cached_property
    def token(self) -> Tensor:
        """What each use depends on."""
        # The factor has no reference to the token: a cycle would last until garbage collection.
        token: Tensor = _ShareWeights.apply(self.factor, self.norm_weight, *self.weights)
        return token

    def linear(
        self,
        x: Tensor,  # [rows, in]
        *,
        add: Tensor | None = None,  # [rows, out]; overwritten
    ) -> Tensor:
        """Multiply by the weights and add the product to `add` in place, if given; [rows, out]."""
        out: Tensor = _Linear.apply(x, add, self.token, self.factor)
        return out


Share = Callable[..., SharedWeight]  # makes one in the precision of a step


class _ShareWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Factor, norm_weight: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factor, ctx.shapes = factor, [weight.shape for weight in weights]
        ctx.save_for_backward(norm_weight, *(weights if norm_weight is not None else ()))
        return torch.empty((), device=weights[0].device)  # never read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        total = release(ctx).take_gradient()
        norm_weight, *weights = ctx.saved_tensors
        parts = total.split([n for n, _ in ctx.shapes])
        if norm_weight is None:
            return (None, None, *parts)
        products = (part * weight for part, weight in zip(parts, weights, strict=True))
        grad_norm_weight = torch.stack([product.sum(0) for product in products]).sum(0)
        total.mul_(norm_weight)
        return (None, grad_norm_weight, *parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, token: Tensor, factor: Factor) -> Tensor:
        del token
        prepared = factor.prepare(x)
        ctx.save_for_backward(*prepared)
        ctx.factor = factor
        if add is not None:
            ctx.mark_dirty(add)
        return factor.multiply(prepared, add=add)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = grads[0].contiguous(), release(ctx)
        needs_x, needs_add, needs_weight, _ = ctx.needs_input_grad
        rows = factor.prepare(grad)
        if needs_weight:
            factor.add_gradient(rows, ctx.saved_tensors)
        grad_x = factor.multiply_back(rows) if needs_x else None
        return grad_x, grad if needs_add else None, None, None


def release(ctx: Any) -> Factor:
    """Return the factor of a node whose backward runs, once: the node outlives it."""
    factor: Factor = ctx.factor
    del ctx.factor
    return factor


class SharedRows:
    """Rows that TTT steps read, each step at places of its own.

    Args:
        rows: [rows, out].
    """

    def __init__(self, rows: Tensor) -> None:
        self.value = rows.detach()
        self.gradient = GradientSum()
        self.token: Tensor = _ShareRows.apply(rows, self.gradient)

    def read(
        self,
        places: Tensor | None = None,  # [active], int64; None: all rows, as they are
        *,
        num_inside: int | None = None,
    ) -> Tensor:
        """Copy these rows, [active, out].

        The first `num_inside` places are distinct; reads at the others get no gradient.
        """
        out: Tensor = _Read.apply(self.token, self.value, places, num_inside, self.gradient)
        return out


class _ShareRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return torch.empty((), device=rows.device)  # never read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        total, ctx.gradient.total = ctx.gradient.total, None
        return total, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        rows: Tensor,
        places: Tensor | None,
        num_inside: int | None,
        gradient: GradientSum,
    ) -> Tensor:
        del token
        ctx.save_for_backward(places)
        ctx.num_rows, ctx.num_inside, ctx.gradient = len(rows), num_inside, gradient
        return rows.clone() if places is None else rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        grad, gradient = grads[0], ctx.gradient
        if places is None:
            gradient.total = grad.clone() if gradient.total is None else gradient.total.add_(grad)
        else:
            if gradient.total is None:
                gradient.total = grad.new_zeros(ctx.num_rows, grad.shape[1])
            add_rows(grad[: ctx.num_inside], places[: ctx.num_inside], gradient.total)
        return None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return pick_rows(grads[0], places), None, None


def gather(
    x: Tensor,  # [seq_len, ...]
    rows: Tensor,  # [active], int64, distinct
    places: Tensor,  # the index of each position in `rows`, or -1
) -> Tensor:
    """Gather these rows, [active, ...]; the backward gathers by their places."""
    out: Tensor = _Gather.apply(x, rows, places)
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads[0].split(ctx.sizes)


def join(
    whole: Tensor,  # [rows, ...]: the memory that the parts share, one after another
    parts: Sequence[Tensor],  # each [some, ...]
) -> Tensor:
    """Concatenate parts that were written into one tensor, without a copy; [rows, ...]."""
    out: Tensor = _Join.apply(whole, *parts)
    return out
