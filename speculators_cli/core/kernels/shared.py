"""What all TTT steps use: its gradient is summed in one buffer, where autograd would add copies.

Both kinds hang on a token: a scalar that carries no value. Each use takes the token and gives it no
gradient, but autograd still runs the node that made it after the last of them; that node hands out
the finished sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.rows import add_rows, pick_rows


class GradientSum:
    """The gradient of a shared tensor, so far; None before the first use's backward."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add_product(
        self,
        grad: Tensor,  # [rows, out]
        x: Tensor,  # [rows, in]
    ) -> None:
        """Add `grad.T @ x`, [out, in], in float32: the GEMM itself adds up."""
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
    """Weights of one input, below each other, cast to the compute dtype once for all uses.

    Args:
        weights: Each [out, in], float32.
        dtype: The compute dtype.
        gain: [in], float32, of a norm before the weights: goes into them, where its gradient costs
            a pass over theirs. In the rows it would cost a GEMM.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, *, gain: Tensor | None = None
    ) -> None:
        first = weights[0]
        num_rows = sum(len(weight) for weight in weights)
        self.value = torch.empty(num_rows, first.shape[1], dtype=dtype, device=first.device)
        with torch.no_grad():
            for part, weight in zip(
                self.value.split([len(weight) for weight in weights]), weights, strict=True
            ):
                if gain is None:
                    part.copy_(weight)
                else:
                    torch.mul(weight, gain, out=part)
        # The sum does not know the token: a cycle would keep all of this until Python collects.
        self.gradient = GradientSum()
        self.token: Tensor = _ShareWeights.apply(self.gradient, gain, *weights)

    def linear(
        self,
        x: Tensor,  # [rows, in]
        *,
        add: Tensor | None = None,  # [rows, out]; overwritten
    ) -> Tensor:
        """Multiply with the weights, add to what is given, in its place; [rows, out]."""
        out: Tensor = _Linear.apply(x, add, self.token, self.value, self.gradient)
        return out


class _ShareWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: GradientSum, gain: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.shapes = gradient, [weight.shape for weight in weights]
        ctx.save_for_backward(gain, *(weights if gain is not None else ()))
        return torch.empty((), device=weights[0].device)  # nobody reads it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        total, ctx.gradient.total = ctx.gradient.total, None
        gain, *weights = ctx.saved_tensors
        assert total is not None, "a product has reached the loss"
        parts = total.split([n for n, _ in ctx.shapes])
        if gain is None:
            return (None, None, *parts)
        products = (part * weight for part, weight in zip(parts, weights, strict=True))
        grad_gain = torch.stack([product.sum(0) for product in products]).sum(0)
        total.mul_(gain)
        return (None, grad_gain, *parts)


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
        """A copy of these rows, [active, out].

        The first `num_inside` places are distinct; what is read at others gets no gradient.
        """
        out: Tensor = _Read.apply(self.token, self.value, places, num_inside, self.gradient)
        return out


class _ShareRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return torch.empty((), device=rows.device)  # nobody reads it

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
    places: Tensor,  # [seq_len], int64: where each position stands in `rows`, or -1
) -> Tensor:
    """Those rows, [active, ...]; the backward reads them back by their places."""
    out: Tensor = _Gather.apply(x, rows, places)
    return out
