"""SwiGLU against its definition."""

import torch
import torch.nn.functional as F

from speculators_cli.core.kernels.swiglu import swiglu
from tests.gradients import assert_same


def test_swiglu_equals_its_definition(rng: torch.Generator) -> None:
    gate_up = torch.randn(5, 100, generator=rng)[:, : 2 * 37]

    assert_same(swiglu, lambda x: F.silu(x[:, :37]) * x[:, 37:], gate_up)
