"""Weights as the products of a training step multiply them: in the compute dtype, or in float8."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speculators_cli.core.kernels.device import has_kernels
from speculators_cli.core.kernels.float8 import (
    MULTIPLE,
    Rounded,
    RoundedPairs,
    multiply,
    round_rows,
    round_weight,
)


class GradientSum:
    """The accumulated gradient of a shared tensor; None before the first use's backward.

    Args:
        dtype: Of the sum of products.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.total: Tensor | None = None

    def add_product(
        self,
        grad: Tensor,  # [rows, out]
        x: Tensor,  # [rows, in]
    ) -> None:
        """Add `grad.T @ x`, [out, in]: the GEMM itself accumulates, in float32."""
        if not grad.is_cuda:
            grad, x = grad.float(), x.float()
        if grad.dtype == self.dtype:
            if self.total is None:
                self.total = grad.T @ x
            else:
                self.total.addmm_(grad.T, x)
        elif not grad.is_cuda:
            product = grad.T @ x
            self.total = (product if self.total is None else product + self.total).to(self.dtype)
        elif self.total is None:
            self.total = torch.mm(grad.T, x, out_dtype=self.dtype)
        else:
            torch.addmm(self.total, grad.T, x, out_dtype=self.dtype, out=self.total)


class Factor(Protocol):
    """A weight as it is multiplied, and the sum of its gradients."""

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What products read of rows, which are inputs or gradients, each once for all products."""

    def rounds(self, x: Tensor) -> bool:
        """Whether a kernel that computes such rows is to round them, in place of `prepare`."""

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """The product with prepared rows, added to `add` in place, if given; [rows, out]."""

    def multiply_back(
        self,
        grad: tuple[Tensor, ...],  # prepared, of [rows, out]
        *,
        into: Tensor | None = None,  # [rows, in]
    ) -> Tensor:
        """The gradient of the rows; [rows, in]."""

    def add_gradient(self, grad: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> None:
        """Add the gradient of the weight to its sum, from prepared rows."""

    def take_gradient(self) -> Tensor:
        """The sum, [out, in]; it begins anew."""


class PlainFactor:
    """A weight in the compute dtype.

    Args:
        parts: Each [out, in], float32 or the compute dtype.
        norm_weight: [in], float32: multiplied into the weights.
        dtype: The compute dtype.
        gradient_dtype: Of the sum of its gradients.
        is_kept: Whether the weight is cast once for all products, which takes memory until the
            last of them; else once for each.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        norm_weight: Tensor | None,
        dtype: torch.dtype,
        *,
        gradient_dtype: torch.dtype,
        is_kept: bool,
    ) -> None:
        self.gradient = GradientSum(gradient_dtype)
        self.parts, self.norm_weight, self.dtype = parts, norm_weight, dtype
        self.kept = self.cast() if is_kept else None

    @torch.no_grad()
    def cast(self) -> Tensor:
        """The stacked weights; [out, in]."""
        first, sizes = self.parts[0], [len(part) for part in self.parts]
        if len(sizes) == 1 and self.norm_weight is None and first.dtype == self.dtype:
            return first.detach()
        value = torch.empty(sum(sizes), first.shape[1], dtype=self.dtype, device=first.device)
        for into, part in zip(value.split(sizes), self.parts, strict=True):
            if self.norm_weight is None:
                into.copy_(part)
            else:
                torch.mul(part, self.norm_weight, out=into)
        return value

    @property
    def value(self) -> Tensor:
        """The weight; [out, in]."""
        return self.cast() if self.kept is None else self.kept

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows as they are."""
        return (x,)

    def rounds(self, x: Tensor) -> bool:  # noqa: ARG002
        """They are not rounded."""
        return False

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """One product."""
        return x[0] @ self.value.T if add is None else add.addmm_(x[0], self.value.T)

    def multiply_back(self, grad: tuple[Tensor, ...], *, into: Tensor | None = None) -> Tensor:
        """One product."""
        return torch.mm(grad[0], self.value, out=into)

    def add_gradient(self, grad: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> None:
        """One product that adds to the sum."""
        self.gradient.add_product(grad[0], x[0])

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
        gradient_dtype: Of its gradient.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        norm_weight: Tensor | None,
        dtype: torch.dtype,
        *,
        gradient_dtype: torch.dtype,
    ) -> None:
        self.weight, self.dtype = round_weight(parts, norm_weight), dtype
        self.gradient_dtype = gradient_dtype
        self.pairs = RoundedPairs()

    @staticmethod
    def is_possible(parts: Sequence[Tensor]) -> bool:
        """Whether the matrix product supports these sizes."""
        return not any(size % MULTIPLE for part in parts for size in part.shape)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows, rounded."""
        return round_rows(x)

    def rounds(self, x: Tensor) -> bool:
        """Where kernels can."""
        return has_kernels(x)

    def multiply(self, x: tuple[Tensor, ...], *, add: Tensor | None = None) -> Tensor:
        """One product, and a pass for the sum."""
        out = multiply(Rounded(*x), self.weight.by_output, self.dtype)
        return out if add is None else add.add_(out)

    def multiply_back(self, grad: tuple[Tensor, ...], *, into: Tensor | None = None) -> Tensor:
        """One product."""
        return multiply(Rounded(*grad), self.weight.by_input, self.dtype, into=into)

    def add_gradient(self, grad: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> None:
        """Keep both: the gradient waits for all uses."""
        self.pairs.add(Rounded(*grad), Rounded(*x))

    def take_gradient(self) -> Tensor:
        """One product over the rows of all uses."""
        return self.pairs.take_product(self.gradient_dtype)
