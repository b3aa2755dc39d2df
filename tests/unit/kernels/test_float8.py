"""Float8 matrices with powers of two as scales, against what e4m3 can hold, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels.float8 import (
    Rounded,
    RoundedPairs,
    multiply,
    round_rows,
    round_weight,
    transpose,
)

GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
GRID = GRID[~GRID.float().isnan()]


@pytest.fixture(params=["plain", "kernels"], autouse=True)
def how(request: pytest.FixtureRequest, round_by_kernels: Callable[[], None]) -> None:
    """Round as on a CPU, and by the kernels of a GPU."""
    if request.param == "kernels":
        round_by_kernels()


def restored(rounded: Rounded) -> Tensor:
    return rounded.values.double() * rounded.scales.double()[:, None]


def rows_of_all_sizes(num_rows: int, width: int, rng: torch.Generator) -> Tensor:
    """Rows whose sizes differ by orders of magnitude, each with an outlier."""
    x = torch.randn(num_rows, width, generator=rng) * torch.logspace(-9, 4, num_rows)[:, None]
    x[:, 3] *= 200
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_rounded_to_nearest_with_the_smallest_power_of_two(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = rows_of_all_sizes(9, 40, rng).to(dtype)

    values, scales = round_rows(x)

    assert torch.equal(scales, scales.log2().round().exp2())
    largest = (x.abs().amax(-1) / scales).double()
    assert ((largest <= 448) & (largest > 224)).all()
    wanted = x.double() / scales.double()[:, None]
    nearest = (GRID.double() - wanted[..., None]).abs().amin(-1)
    assert torch.equal((values.double() - wanted).abs(), nearest)


def test_a_row_of_zeros_stays_zero() -> None:
    rounded = round_rows(torch.zeros(2, 16))

    assert not restored(rounded).any()
    assert rounded.scales.isfinite().all()


# The interpreter warns of inf * 0.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_products_of_a_row_that_is_not_finite_are_nan(value: float) -> None:
    x = torch.ones(3, 16)
    x[1, 5] = value

    product = multiply(round_rows(x), round_rows(torch.ones(16, 16)), torch.float32)

    assert product.isnan().all(-1).tolist() == [False, True, False]


def test_a_weight_is_the_same_in_both_layouts(rng: torch.Generator) -> None:
    parts = [torch.randn(n, 16, generator=rng) for n in (32, 16)]
    norm_weight = 1 + torch.rand(16, generator=rng)
    product = torch.cat(parts) * norm_weight

    weight = round_weight(parts, norm_weight)

    found = restored(weight.by_output)
    assert torch.equal(found, restored(weight.by_input).T)
    # Three bits of mantissa; below the smallest normal value, half a unit of 2^-9.
    bound = torch.maximum(product.abs() * 2**-4, weight.by_output.scales[:, None] * 2**-10)
    assert ((found - product).abs() <= bound * (1 + 2**-20)).all()
    assert weight.by_output.values.float().abs().max() > 100


def test_a_product_is_that_of_the_rounded_factors(rng: torch.Generator) -> None:
    x, weight = rows_of_all_sizes(5, 32, rng), torch.randn(48, 32, generator=rng)
    rounded, others = round_rows(x), round_weight([weight], None).by_output

    product = multiply(rounded, others, torch.float32)

    exact = restored(rounded) @ restored(others).T
    scale = exact.abs().amax(-1, keepdim=True)
    # Sums of 32 terms in float32.
    assert ((product - exact).abs() <= scale * 1e-6).all()


def test_transposed_factors_have_the_same_product(rng: torch.Generator) -> None:
    grad = round_rows(rows_of_all_sizes(5, 48, rng))
    x = round_rows(rows_of_all_sizes(5, 32, rng))
    scales = torch.exp2(-torch.arange(5.0))
    into_grad, into_x = (
        torch.full((size, 16), torch.nan).to(torch.float8_e4m3fn) for size in (48, 32)
    )

    transpose(grad.values, x.values, scales, torch.tensor([4.0]), into_grad, into_x)

    assert torch.equal(into_grad[:, :5].float().T, grad.values.float())
    wanted = x.values.double() * scales[:, None] / 4
    # Only what falls below the smallest normal value is rounded again, by half a unit of 2^-9.
    error = (into_x[:, :5].double().T - wanted).abs()
    assert (error[wanted.abs() >= 2**-6] == 0).all()
    assert (error <= 2**-10).all()
    assert not any(into[:, 5:].float().any() for into in (into_grad, into_x))


def test_a_weights_gradient_is_the_sum_over_all_uses(rng: torch.Generator) -> None:
    pairs = RoundedPairs()
    uses = []
    for num_rows, size in ((7, 1.0), (0, 1.0), (18, 1e-3)):
        grad = torch.randn(num_rows, 32, generator=rng) * size
        x = torch.randn(num_rows, 48, generator=rng) * torch.rand(num_rows, 1, generator=rng)
        uses.append((round_rows(grad), round_rows(x)))
        pairs.add(*uses[-1])

    total = pairs.take_product(torch.float32)

    exact = torch.stack([restored(grad).T @ restored(x) for grad, x in uses]).sum(0)
    assert exact.abs().max() > 1
    # Inputs have the scale of the row with the largest product: what becomes smaller than the
    # smallest normal value is rounded again, by half a unit of 2^-9.
    largest = max(float((grad.scales * x.scales).max()) for grad, x in uses if len(x.scales))
    sizes = torch.stack([grad.values.double().abs().sum(0) for grad, _ in uses]).sum(0)
    bound = sizes[:, None] * largest * 2**-10 + exact.abs().max() * 1e-6
    error = (total - exact).abs()
    assert (error <= bound).all()
    assert error.norm() < 1e-3 * exact.norm()
    assert pairs.pairs == []


def test_uses_of_no_rows_have_no_gradient() -> None:
    pairs = RoundedPairs()
    pairs.add(round_rows(torch.zeros(0, 32)), round_rows(torch.zeros(0, 48)))

    assert torch.equal(pairs.take_product(torch.float32), torch.zeros(32, 48))
