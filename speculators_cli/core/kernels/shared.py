"""Tensors shared by all TTT steps: their gradients are summed in one buffer, without copies.

Both kinds depend on a token: a scalar without a value. Each use takes the token and returns no
gradient for it, but autograd still runs the node that created it after the last of them; that node
returns the finished sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.rows import add_rows, pick_rows


class GradientSum:
    """The accumulated gradient of a shared tensor; None before the first use's backward."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add_product(
        self,
        grad: Tensor,  # [rows, out]
        x: Tensor,  # [rows, in]
    ) -> None:
        """Add `grad.T @ x`, [out, in], in float32: the GEMM itself accumulates."""
        if grad.dtype != torch.float32 and not grad.is_cuda:
            grad, x = grad.float(), x.float()
        if grad.dtype == torch.float32:
            if self.total is None:
                self.total = grad.T @ x
            else:
                self.total.addmm_(grad.T, x)
        elif self.total is None:
            self.total = torch.mm(grad.T, x, out_dtype=torch.float32)
        else:
            torch.addmm(self.total, grad.T, x, out_dtype=torch.float32, out=self.total)


class SharedWeight:
    """Stacked weights of one input, cast to the compute dtype once for all uses.

    Args:
        weights: Each [out, in], float32.
        dtype: The compute dtype.
        norm_weight: [in], float32, of a norm before the weights: folded into them, where its
            gradient costs one pass over theirs. Applied to the rows, it would cost a GEMM.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, *, norm_weight: Tensor | None = None
    ) -> None:
        first = weights[0]
        num_rows = sum(len(weight) for weight in weights)
        self.value = torch.empty(num_rows, first.shape[1], dtype=dtype, device=first.device)
        with torch.no_grad():
            for part, weight in zip(
                self.value.split([len(weight) for weight in weights]), weights, strict=True
            ):
                if norm_weight is None:
                    part.copy_(weight)
                else:
                    torch.mul(weight, norm_weight, out=part)
        # The sum has no reference to the token: a cycle would last until garbage collection.
        self.gradient = GradientSum()
        self.token: Tensor = _ShareWeights.apply(self.gradient, norm_weight, *weights)

    def linear(
        self,
        x: Tensor,  # [rows, in]
        *,
        add: Tensor | None = None,  # [rows, out]; overwritten
    ) -> Tensor:
        """Multiply by the weights and add the product to `add` in place, if given; [rows, out]."""
        out: Tensor = _Linear.apply(x, add, self.token, self.value, self.gradient)
        return out


class _ShareWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: GradientSum, norm_weight: Tensor | None, *weights: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.shapes = gradient, [weight.shape for weight in weights]
        ctx.save_for_backward(norm_weight, *(weights if norm_weight is not None else ()))
        return torch.empty((), device=weights[0].device)  # never read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        total, ctx.gradient.total = ctx.gradient.total, None
        norm_weight, *weights = ctx.saved_tensors
        assert total is not None, "a product contributes to the loss"
        parts = total.split([n for n, _ in ctx.shapes])
        if norm_weight is None:
            return (None, None, *parts)
        products = (part * weight for part, weight in zip(parts, weights, strict=True))
        grad_norm_weight = torch.stack([product.sum(0) for product in products]).sum(0)
        total.mul_(norm_weight)
        return (None, grad_norm_weight, *parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        add: Tensor | None,
        token: Tensor,
        weight: Tensor,
        gradient: GradientSum,
    ) -> Tensor:
        del token
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        if add is None:
            return x @ weight.T
        ctx.mark_dirty(add)
        return add.addmm_(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_x, needs_add, needs_weight, *_ = ctx.needs_input_grad
        if needs_weight:
            ctx.gradient.add_product(grad, x)
        return (
            grad @ weight if needs_x else None,
            grad if needs_add else None,
            None,
            None,
            None,
        )


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
