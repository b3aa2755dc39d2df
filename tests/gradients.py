"""Two ways to compute the same, compared with their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.batch import Batch

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


def assert_same(
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    *inputs: Tensor,
    tolerance: float = RTOL,
) -> None:
    ours = gradients(fast, *inputs, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, *inputs, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(own, exact, rtol=tolerance, atol=tolerance)


def assert_float8_is_near(draft: DraftModel, batch: Batch) -> None:
    """Compare a step in float8 with the same in float32: close, and not equal."""
    found = []
    for in_float8 in (True, False):
        draft.use_float8 = in_float8
        draft.zero_grad()
        sums = draft(batch)
        sums.loss.backward()
        found.append((sums.loss.item(), {n: p.grad for n, p in draft.named_parameters()}))

    (loss, own), (exact_loss, exact) = found
    assert 0 < abs(loss - exact_loss) < 0.05 * exact_loss
    for name, wanted in exact.items():
        assert wanted is not None
        grad = own[name]
        assert grad is not None, name
        # A product's error is about 3 %, and a gradient has passed through a dozen of them.
        assert 1e-3 < (grad - wanted).norm() / wanted.norm() < 0.25, name


def assert_float8_is_off(draft: DraftModel, batch: Batch) -> None:
    """Compare a validation with float8 products and without: equal bits."""
    with torch.no_grad():
        plain = draft(batch)
        draft.use_float8 = True
        found = draft(batch)

    assert torch.equal(found.stacked(), plain.stacked())
