"""RMSNorm that takes in the residual."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.kernels.rms_norm import norm_linear, rms_norm
from speculators_cli.core.kernels.shared import SharedWeight
from tests.gradients import assert_same, gradients


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("uses", ["both", "normed"])
def test_rms_norm_adds_and_gives_both_gradients(
    uses: str, adds: bool, rng: torch.Generator
) -> None:
    x, add = (torch.randn(5, 12, generator=rng) for _ in range(2))
    weight = 1 + torch.randn(12, generator=rng)

    def join(normed: Tensor, residual: Tensor) -> Tensor:
        return {"both": normed * 3 + residual, "normed": normed}[uses]

    def fast(x: Tensor, add: Tensor, weight: Tensor) -> Tensor:
        return join(*rms_norm(x, weight, 1e-5, add=add if adds else None)) + 0 * (weight + add)

    def plain(x: Tensor, add: Tensor, weight: Tensor) -> Tensor:
        summed = x + add if adds else x
        return join(F.rms_norm(summed, (12,), weight, 1e-5), summed) + 0 * (weight + add)

    ours = gradients(fast, x, add, weight, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, x, add, weight, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def test_rms_norm_writes_where_it_is_told(rng: torch.Generator) -> None:
    x, weight = torch.randn(5, 12, generator=rng), 1 + torch.randn(12, generator=rng)
    room = torch.zeros(5, 2, 12)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5, into=room[:, 1])[0]

    assert_same(fast, lambda x, weight: F.rms_norm(x, (12,), weight, 1e-5), x, weight)

    torch.testing.assert_close(room[:, 1], F.rms_norm(x, (12,), weight, 1e-5))
    assert not room[:, 0].any()


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("uses", ["both", "product"])
@pytest.mark.parametrize("is_kept", [True, False])
def test_norm_linear_equals_one_after_the_other(
    uses: str, adds: bool, is_kept: bool, rng: torch.Generator
) -> None:
    x, add = (torch.randn(5, 12, generator=rng) for _ in range(2))
    gain = 1 + torch.randn(12, generator=rng)
    first, second = (torch.randn(n, 12, generator=rng) for n in (7, 3))

    def join(product: Tensor, residual: Tensor) -> Tensor:
        return torch.cat((product, residual * (uses == "both")), dim=1)

    def fast(x: Tensor, add: Tensor, gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        weight = SharedWeight([first, second], torch.float32, is_kept=is_kept)
        return join(*norm_linear(x, gain, 1e-5, weight, add=add if adds else None)) + 0 * add.sum()

    def plain(x: Tensor, add: Tensor, gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        summed = x + add if adds else x
        normed = F.rms_norm(summed, (12,), gain, 1e-5)
        return join(normed @ torch.cat((first, second)).T, summed) + 0 * add.sum()

    ours, theirs = (
        gradients(f, x, add, gain, first, second, rng=torch.Generator().manual_seed(1))
        for f in (fast, plain)
    )
    for own, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def test_what_was_normalised_is_the_same_when_computed_again(rng: torch.Generator) -> None:
    # A gradient of bfloat16 rows must not depend on whether they were kept.
    x = torch.randn(9, 16, generator=rng).bfloat16()
    gain, weight = 1 + torch.randn(16, generator=rng), torch.randn(7, 16, generator=rng)

    def gradient(*, keeps: bool) -> Tensor:
        leaf = weight.clone().requires_grad_()
        shared = SharedWeight([leaf], torch.bfloat16)
        if keeps:
            out = shared.linear(rms_norm(x, gain, 1e-5)[0])
        else:
            out = norm_linear(x, gain, 1e-5, shared)[0]
        out.backward(torch.ones_like(out))
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(keeps=True), gradient(keeps=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_to_float8_where_they_are_computed(
    dtype: torch.dtype, rng: torch.Generator, round_by_kernels: Callable[[], None]
) -> None:
    x, add = (torch.randn(5, 48, generator=rng).to(dtype) for _ in range(2))
    gain, weight = 1 + torch.randn(48, generator=rng), torch.randn(16, 48, generator=rng)

    def run() -> list[Tensor]:
        leaves = [part.clone().requires_grad_() for part in (x, add, gain, weight)]
        shared = SharedWeight([leaves[3]], dtype, in_float8=True)
        out, summed = norm_linear(leaves[0], leaves[2], 1e-5, shared, add=leaves[1])
        torch.autograd.backward([out, summed], [out.detach(), summed.detach()])
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    apart = run()
    round_by_kernels()
    at_once = run()

    assert len(apart) == 5
    for own, wanted in zip(at_once, apart, strict=True):
        assert torch.equal(own, wanted)
