"""Weights and rows that several TTT steps share: their gradients add up."""

import torch
from torch import Tensor

from speculators_cli.core.kernels.shared import SharedRows, SharedWeight, gather
from tests.gradients import assert_same


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
    add_product = other.gradient.add_product

    def watch(grad: Tensor, x: Tensor) -> None:
        add_product(grad, x)
        assert other.gradient.total is not None
        totals.append(other.gradient.total.data_ptr())

    other.gradient.add_product = watch  # type: ignore[method-assign]
    out.backward()

    assert weight.grad is not None
    assert totals == [weight.grad.data_ptr()]


def test_a_frozen_shared_weight_gets_no_gradient(rng: torch.Generator) -> None:
    weight, x = torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)
    x.requires_grad_()

    shared = SharedWeight([weight], torch.float32)
    shared.linear(x).sum().backward()

    assert shared.gradient.total is None
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
