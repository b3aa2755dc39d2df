"""The FlashAttention path against the plain one, on a GPU."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.models.attention import plain_attention
from speculators_cli.core.models.flash import FlashJointAttention, can_use_flash

pytestmark = pytest.mark.gpu


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (6, 6, 128), (4, 1, 40)])
def test_flash_is_as_close_to_float32_as_the_plain_path(
    num_steps: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    bounds = (0, 100, 101, 300, 384)
    query = torch.randn(384, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    keys_and_values = [
        torch.randn(384, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(2 * num_steps)
    ]
    grad = torch.randn_like(query)
    assert can_use_flash(query)

    def run(attend: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (query, *keys_and_values)]
        out = attend(leaves[0], bounds, *leaves[1:])  # type: ignore[operator]
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run(plain_attention, torch.float32)
    plain = run(plain_attention, torch.bfloat16)
    flash = run(FlashJointAttention.apply, torch.bfloat16)

    for index, (a, b, c) in enumerate(zip(flash, plain, exact, strict=True)):
        # bfloat16 keeps 8 bits, so both are off by some 1e-2; flash by no more than the plain path.
        assert relative_error(a, c) <= max(1.1 * relative_error(b, c), 1e-2), index
