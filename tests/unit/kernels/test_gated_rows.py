"""The kernel that rounds gated activations against the eager layers."""

import pytest
import torch
import torch.nn.functional as F

from speculators_cli.core.kernels.gated_rows import round_into

MAX_VALUE, MIN_SCALE = 448.0, 2.0**-40


@pytest.mark.parametrize("size", [16, 112, 1040])
def test_rows_are_scaled_and_rounded_as_by_eager_layers(size: int, rng: torch.Generator) -> None:
    # Tokens of very different size, and one of zeros.
    sizes = torch.tensor([1.0, 0.0, 15.0, 0.1, 1e-7])[:, None]
    # Triton's interpreter rounds to float16 as torch does, not to bfloat16 and float8.
    gate, up = ((torch.randn(5, size, generator=rng) * sizes).half() for _ in range(2))
    values, scales = torch.empty(5, size), torch.empty(5, 1)

    round_into(gate, up, values, scales, MAX_VALUE, MIN_SCALE)

    product = (F.silu(gate) * up).float()
    expected_scales = (product.abs().amax(-1, keepdim=True) / MAX_VALUE).clamp(min=MIN_SCALE)
    expected = product / expected_scales
    # The exponential differs in its last bit, so that a few values round the other way in float16,
    # which keeps 11 bits.
    torch.testing.assert_close(scales, expected_scales, rtol=2**-10, atol=0)
    torch.testing.assert_close(values, expected, rtol=2**-9, atol=0)
    assert (values == expected).float().mean() > 0.99
    assert values[[0, 2, 3]].abs().amax(-1).tolist() == pytest.approx([MAX_VALUE] * 3)
