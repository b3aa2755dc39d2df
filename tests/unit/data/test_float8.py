"""Float8 with a scale per token: the rule of the scale, and what reading gives back."""

import pytest
import torch

from speculators_cli.core.data import float8
from speculators_cli.core.data.float8 import ScaledStates, quantize_rows

HIDDEN = 24
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def states_of(num_rows: int) -> torch.Tensor:
    """Rows whose sizes differ by orders of magnitude, the first with massive activations."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 2, num_rows, dtype=torch.float64)[:, None]
    states = sizes * torch.randn(num_rows, HIDDEN, generator=generator, dtype=torch.float64)
    states[0, 5], states[0, 7] = -4793.0, 3210.0
    return states


def read(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return ScaledStates(values, scales[:, None])[:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_value_of_a_row_becomes_the_largest_float8(dtype: torch.dtype) -> None:
    states = states_of(11).to(dtype)

    values, scales = quantize_rows(states)

    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    # One division in float32.
    expected = states.double().abs().amax(-1) / 448
    torch.testing.assert_close(scales.double(), expected, rtol=2**-24, atol=0)
    assert values.float().abs().amax(-1).eq(448).all()


def test_values_are_the_nearest_of_their_row() -> None:
    states = states_of(11).bfloat16()

    values, scales = quantize_rows(states)
    found = read(values, scales).double()

    scale = scales.double()[:, None]
    # Three bits of mantissa: half a unit is 2^-4 of a normal value; below 2^-6 units are 2^-9. The
    # product is rounded to bfloat16, by half a unit of 2^-8, and the quotient to float32.
    exact = states.double()
    bound = torch.maximum(exact.abs() * 2**-4, scale * 2**-10) + exact.abs() * (2**-8 + 2**-20)
    assert ((found - exact).abs() <= bound).all()
    # No other float8 is nearer, but for a tie within the rounding of the quotient.
    grid = CODES[~CODES.float().isnan()].double() * scale[..., None]
    nearest = (grid - exact[..., None]).abs().amin(-1)
    error = (values.double() * scale - exact).abs()
    assert (error <= nearest + exact.abs() * 2**-20).all()


def test_massive_activations_leave_the_other_tokens_alone() -> None:
    states = states_of(11).bfloat16()

    together, alone = quantize_rows(states), quantize_rows(states[1:])

    assert read(*together)[0, 5] == torch.tensor(-4793.0).bfloat16()
    assert torch.equal(together[1][1:], alone[1])
    assert torch.equal(together[0][1:].view(torch.uint8), alone[0].view(torch.uint8))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-42, 1e-38, 1e-35, 3e38])
def test_rows_of_any_size_are_finite(size: float) -> None:
    states = torch.full((2, HIDDEN), size)

    values, scales = quantize_rows(states)
    found = values.double() * scales.double()[:, None]

    assert found.isfinite().all()
    assert scales.isfinite().all()
    # A value below the smallest normal float32 may become zero.
    torch.testing.assert_close(found, states.double(), rtol=2**-20, atol=2.0**-126)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_finite_scale(value: float) -> None:
    states = torch.ones(3, HIDDEN)
    states[1, 4] = value

    _, scales = quantize_rows(states)

    assert scales.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("at_once", [1, 600, 2**20])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-126, 3.7e30])
def test_every_float8_is_scaled_in_float32_and_rounded_once(
    scale: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8, "SCALED_AT_ONCE", at_once)
    values = CODES.repeat(5, 1)
    scales = torch.tensor([scale, 1.0, 0.0, 7.0, scale])[:, None]

    found = ScaledStates(values, scales)[:]

    # By torch's own conversion.
    expected = (values.float() * scales).bfloat16()
    assert found.isnan().sum() == 5 * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    is_zero = expected == 0
    assert torch.equal(found[is_zero].signbit(), expected[is_zero].signbit())


def test_an_odd_number_of_values_is_read() -> None:
    states = states_of(3)[:, :5]

    values, scales = quantize_rows(states)

    assert torch.equal(read(values, scales), (values.float() * scales[:, None]).bfloat16())


def test_rows_are_read_by_slice_indices_and_mask() -> None:
    values, scales = quantize_rows(states_of(11))
    states = ScaledStates(values, scales[:, None])
    whole = states[:]
    mask = torch.arange(11) % 3 == 1

    assert torch.equal(states[2:9], whole[2:9])
    assert torch.equal(states[torch.tensor([0, 4, 10])], whole[[0, 4, 10]])
    assert torch.equal(states[mask], whole[mask])
    assert torch.equal(torch.cat([*states.split(4)]), whole)
    assert (states.shape, states.dtype, len(states)) == ((11, HIDDEN), torch.bfloat16, 11)
