"""RMSNorm that takes in the residual."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.kernels.rms_norm import rms_norm
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
