"""Weights and rows that several TTT steps share: their gradients add up."""

from functools import partial

import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels.factors import Float8Factor, PlainFactor
from speculators_cli.core.kernels.shared import SharedRows, SharedWeight, gather, join
from tests.gradients import assert_same, gradients


def test_a_shared_weight_adds_up_its_uses(rng: torch.Generator) -> None:
    first, second, *x = (torch.randn(n, 6, generator=rng) for n in (4, 3, 5, 2, 5))

    def fast(first: Tensor, second: Tensor, *x: Tensor) -> Tensor:
        weight = SharedWeight([first, second], torch.float32)
        a, b, c = (weight.linear(part) for part in x)
        return torch.cat([b, weight.linear(x[0], add=a), c])

    def plain(first: Tensor, second: Tensor, *x: Tensor) -> Tensor:
        weight = torch.cat([first, second])
        a, b, c = (part @ weight.T for part in x)
        return torch.cat([b, a + x[0] @ weight.T, c])

    assert_same(fast, plain, first, second, *x)


def test_a_shared_weights_gradient_is_handed_over_without_a_copy(rng: torch.Generator) -> None:
    # A copy of every gradient would cost a pass over the optimizer's memory, and as much of it.
    weight = torch.randn(3, 4, generator=rng).requires_grad_()
    totals: list[int] = []
    other = SharedWeight([weight], torch.float32)
    out = other.linear(torch.randn(5, 4, generator=rng)).sum()
    take_gradient = other.factor.take_gradient

    def watch() -> Tensor:
        total = take_gradient()
        totals.append(total.data_ptr())
        return total

    other.factor.take_gradient = watch  # type: ignore[method-assign]
    out.backward()

    assert weight.grad is not None
    assert totals == [weight.grad.data_ptr()]


def test_a_frozen_shared_weight_gets_no_gradient(rng: torch.Generator) -> None:
    weight, x = torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)
    x.requires_grad_()

    shared = SharedWeight([weight], torch.float32)
    shared.linear(x).sum().backward()

    assert isinstance(shared.factor, PlainFactor)
    assert shared.factor.gradient.total is None
    assert x.grad is not None


def test_norm_weights_are_folded_into_the_weights(rng: torch.Generator) -> None:
    gain = 1 + torch.randn(6, generator=rng)
    first, second, x = (torch.randn(n, 6, generator=rng) for n in (4, 3, 5))

    def fast(gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return SharedWeight([first, second], torch.float32, norm_weight=gain).linear(x)

    def plain(gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (x * gain) @ torch.cat([first, second]).T

    assert_same(fast, plain, gain, first, second)


def test_a_shared_weights_gradient_adds_up_in_float32() -> None:
    # Trap: 300 products of one are 256 in bfloat16.
    weight = torch.zeros(1, 1).requires_grad_()
    shared = SharedWeight([weight], torch.bfloat16)

    outs = [shared.linear(torch.ones(1, 1, dtype=torch.bfloat16)) for _ in range(300)]
    torch.cat(outs).sum().backward()

    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.item() == 300


def test_a_weight_in_float8_has_nearly_the_same_products_and_gradients(
    rng: torch.Generator,
) -> None:
    gain = 1 + 0.3 * torch.randn(64, generator=rng)
    first, second, *x = (torch.randn(n, 64, generator=rng) for n in (48, 32, 5, 40, 19))

    def shared(gain: Tensor, first: Tensor, second: Tensor, *x: Tensor, in_float8: bool) -> Tensor:
        weight = SharedWeight([first, second], torch.float32, norm_weight=gain, in_float8=in_float8)
        assert isinstance(weight.factor, Float8Factor) == in_float8
        a, *others = (weight.linear(part) for part in x)
        return torch.cat([*others, weight.linear(x[0], add=a)])

    found, exact = (
        gradients(
            partial(shared, in_float8=in_float8), gain, first, second, *x,
            rng=torch.Generator().manual_seed(1),
        )
        for in_float8 in (True, False)
    )  # fmt: skip

    for own, wanted in zip(found, exact, strict=True):
        # Each factor has errors of up to 2^-4, evenly distributed: 2^-4 / sqrt(3) by the mean
        # square at worst, and there are two.
        assert 1e-3 < (own - wanted).norm() / wanted.norm() < 2**-4 * (2 / 3) ** 0.5


def test_a_frozen_weight_in_float8_gets_no_gradient(rng: torch.Generator) -> None:
    # As a verifier's LM head, which a draft may share, and which is in bfloat16.
    weight = torch.randn(32, 16, generator=rng).bfloat16()
    x = torch.randn(5, 16, generator=rng).requires_grad_()

    shared = SharedWeight([weight], torch.float32, in_float8=True)
    shared.linear(x).sum().backward()

    assert isinstance(shared.factor, Float8Factor)
    assert shared.factor.pairs.pairs == []
    assert x.grad is not None
    exact = weight.float().sum(0).expand(5, 16)
    # Weights have errors of up to 2^-4 each.
    assert (x.grad - exact).norm() < 2**-4 * exact.norm()


@pytest.mark.parametrize("sizes", [(40, 32), (32, 40)])
def test_a_weight_of_other_sizes_keeps_the_compute_dtype(
    sizes: tuple[int, int], rng: torch.Generator
) -> None:
    weight = torch.randn(sizes, generator=rng)

    shared = SharedWeight([weight], torch.float32, in_float8=True)

    assert isinstance(shared.factor, PlainFactor)


def test_shared_rows_add_up_what_is_read(rng: torch.Generator) -> None:
    rows = torch.randn(6, 3, generator=rng)
    places = [torch.tensor([1, 2, 4]), torch.tensor([2, 3, 5])]

    def fast(rows: Tensor) -> Tensor:
        shared = SharedRows(rows)
        return torch.cat([shared.read(), *(shared.read(at) for at in places)])

    assert_same(fast, lambda rows: torch.cat([rows, *(rows[at] for at in places)]), rows)


def test_what_is_read_past_the_end_gets_no_gradient(rng: torch.Generator) -> None:
    rows = torch.randn(4, 3, generator=rng).requires_grad_()

    out = SharedRows(rows).read(torch.tensor([2, 3, 3]), num_inside=2)
    out.backward(torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 3))

    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [0, 0, 1, 2]


def test_gathered_rows_give_their_gradient_back(rng: torch.Generator) -> None:
    rows = torch.tensor([0, 3, 4])

    places = torch.tensor([0, -1, -1, 1, 2, -1])

    def fast(x: Tensor) -> Tensor:
        return gather(x, rows, places)

    assert_same(fast, lambda x: x[rows], torch.randn(6, 2, 3, generator=rng))


def test_parts_of_one_tensor_are_joined_without_a_copy(rng: torch.Generator) -> None:
    whole = torch.empty(5, 3)
    first, second = (torch.randn(n, 3, generator=rng, requires_grad=True) for n in (2, 3))
    whole[:2], whole[2:] = first.detach(), second.detach()

    joined = join(whole, [first, second])
    (joined * torch.arange(5.0)[:, None]).sum().backward()

    assert torch.equal(joined, torch.cat([first, second]))
    assert joined.data_ptr() == whole.data_ptr()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad[:, 0].tolist() == [0, 1]
    assert second.grad[:, 0].tolist() == [2, 3, 4]
