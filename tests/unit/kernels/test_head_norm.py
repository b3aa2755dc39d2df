"""Norm of heads and rotation together, against one after the other."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels import head_norm
from speculators_cli.core.kernels.head_norm import norm_and_rotate
from speculators_cli.core.kernels.rotary import rotate
from speculators_cli.core.models.layers import RMSNorm
from tests.gradients import assert_same


@pytest.mark.parametrize("num_programs", [2, 100])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (3, 12), (1, 10)])
def test_norm_and_rotate_equals_one_after_the_other(
    heads: int,
    head_dim: int,
    num_programs: int,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_norm, "NUM_PROGRAMS", num_programs)
    angles = torch.rand(6, 1, head_dim // 2, generator=rng) * 7
    rope = tuple(torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    cos, sin = rope
    positions = torch.tensor([3, 0, 5, 5, 1])
    # Rows of more than these heads, as a product of stacked weights gives them.
    x = torch.randn(5, heads + 2, head_dim, generator=rng)
    weight = torch.randn(head_dim, generator=rng)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return norm_and_rotate(x[:, 1:-1], weight, 1e-5, (cos, sin), positions)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        norm = RMSNorm(head_dim, 1e-5)
        del norm.weight
        norm.weight = weight  # type: ignore[assignment]
        return rotate(norm(x[:, 1:-1]), (cos, sin), positions)

    assert_same(fast, plain, x, weight)
