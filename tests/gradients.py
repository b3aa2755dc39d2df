"""Two ways to compute the same, compared with their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

# Sums of tens of float32 terms, added in another order.
RTOL = ATOL = 1e-5


def gradients(
    compute: Callable[..., Tensor], *inputs: Tensor, rng: torch.Generator
) -> list[Tensor]:
    """What a function gives, and the gradients of its inputs for a random one of its output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = compute(*leaves)
    out.backward(torch.randn(out.shape, generator=rng))
    found: list[Tensor] = [out.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


def assert_same(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    ours = gradients(fast, *inputs, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, *inputs, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(own, exact, rtol=RTOL, atol=ATOL)
