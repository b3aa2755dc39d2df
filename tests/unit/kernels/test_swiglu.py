"""The product of a gated activation against its definition."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.kernels import swiglu
from speculators_cli.core.kernels.shared import SharedWeight
from speculators_cli.core.kernels.swiglu import gated_linear
from tests.gradients import assert_same


def test_gated_linear_equals_its_definition(rng: torch.Generator) -> None:
    x = torch.randn(5, 6, generator=rng)
    both, down = torch.randn(2 * 37, 6, generator=rng), torch.randn(4, 37, generator=rng)

    def fast(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        return gated_linear(x @ both.T, SharedWeight([down], torch.float32))

    def plain(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ both.T).chunk(2, dim=1)
        return (F.silu(gate) * up) @ down.T

    assert_same(fast, plain, x, both, down)


def test_a_frozen_weight_gets_no_gradient(rng: torch.Generator) -> None:
    gate_up = torch.randn(5, 12, generator=rng).requires_grad_()
    weight = torch.randn(4, 6, generator=rng)

    gated_linear(gate_up * 1, SharedWeight([weight], torch.float32)).sum().backward()

    assert gate_up.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_rounded_to_float8_where_they_are_computed(
    dtype: torch.dtype,
    rng: torch.Generator,
    round_by_kernels: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swiglu, "ROW_BLOCK", 32)  # two blocks in a row
    gate_up, weight = torch.randn(5, 96, generator=rng), torch.randn(16, 48, generator=rng)
    grad = torch.randn(5, 16, generator=rng).to(dtype)

    def run() -> list[Tensor]:
        rows = gate_up.to(dtype).requires_grad_()
        leaf = weight.clone().requires_grad_()
        out = gated_linear(rows * 1, SharedWeight([leaf], dtype, in_float8=True))
        out.backward(grad)
        return [out.detach(), *(x.grad for x in (rows, leaf) if x.grad is not None)]

    apart = run()
    round_by_kernels()
    at_once = run()

    assert len(apart) == 3
    for own, wanted in zip(at_once, apart, strict=True):
        assert torch.equal(own, wanted)
