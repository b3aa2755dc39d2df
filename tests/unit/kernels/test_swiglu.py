"""The product of a gated activation against its definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
