"""Weights as the products of a training step multiply them: in the compute dtype, or in float8."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speculators_cli.core.kernels.float8 import (
    MULTIPLE,
    Rounded,
    RoundedPairs,
    multiply,
    round_rows,
    round_weight,
)


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


class Factor(Protocol):
    """A weight as it is multiplied, and the sum of its gradients."""

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the products read of rows [rows, in], forward and backward."""

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """The product with prepared rows, added to `add` in place, if given; [rows, out]."""

    def multiply_back(
        self,
        grad: Tensor,  # [rows, out]
        x: tuple[Tensor, ...],
        *,
        needs_x: bool,
        needs_weight: bool,
        into: Tensor | None = None,  # [rows, in]
    ) -> Tensor | None:
        """The gradient of the rows, [rows, in]; that of the weight is added to its sum."""

    def take_gradient(self) -> Tensor:
        """The sum, [out, in], float32; it begins anew."""


class PlainFactor:
    """A weight in the compute dtype.

    Args:
        parts: Each [out, in], float32 or the compute dtype.
        norm_weight: [in], float32: multiplied into the weights.
        dtype: The compute dtype.
    """

    def __init__(
        self, parts: Sequence[Tensor], norm_weight: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.gradient = GradientSum()
        first, sizes = parts[0], [len(part) for part in parts]
        if len(parts) == 1 and norm_weight is None and first.dtype == dtype:
            self.value = first.detach()
            return
        self.value = torch.empty(sum(sizes), first.shape[1], dtype=dtype, device=first.device)
        for into, part in zip(self.value.split(sizes), parts, strict=True):
            if norm_weight is None:
                into.copy_(part)
            else:
                torch.mul(part, norm_weight, out=into)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows as they are."""
        return (x,)

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """One product."""
        return x[0] @ self.value.T if add is None else add.addmm_(x[0], self.value.T)

    def multiply_back(
        self,
        grad: Tensor,
        x: tuple[Tensor, ...],
        *,
        needs_x: bool,
        needs_weight: bool,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """Two products, of which one adds to the sum."""
        if needs_weight:
            self.gradient.add_product(grad, x[0])
        return torch.mm(grad, self.value, out=into) if needs_x else None

    def take_gradient(self) -> Tensor:
        """The sum of all products."""
        total, self.gradient.total = self.gradient.total, None
        assert total is not None, "a product contributes to the loss"
        return total


class Float8Factor:
    """A weight in float8; rows and gradients are rounded as they come.

    Args:
        parts: Each [out, in], float32.
        norm_weight: [in], float32: multiplied into the weights.
        dtype: Of the products.
    """

    def __init__(
        self, parts: Sequence[Tensor], norm_weight: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.weight, self.dtype = round_weight(parts, norm_weight), dtype
        self.pairs = RoundedPairs()

    @staticmethod
    def is_possible(parts: Sequence[Tensor]) -> bool:
        """Whether the matrix product supports these sizes."""
        return not any(size % MULTIPLE for part in parts for size in part.shape)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows, rounded."""
        return round_rows(x)

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """One product, and a pass for the sum."""
        out = multiply(Rounded(*x), self.weight.by_output, self.dtype)
        return out if add is None else add.add_(out)

    def multiply_back(
        self,
        grad: Tensor,
        x: tuple[Tensor, ...],
        *,
        needs_x: bool,
        needs_weight: bool,
        into: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient is rounded once for both products; that of the weight waits for all uses."""
        rounded = round_rows(grad)
        if needs_weight:
            self.pairs.add(rounded, Rounded(*x))
        return multiply(rounded, self.weight.by_input, self.dtype, into=into) if needs_x else None

    def take_gradient(self) -> Tensor:
        """One product over the rows of all uses."""
        return self.pairs.take_product()
