"""Gated activations, silu(gate) * up, rounded to float8 in the pass that computes them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WARPS = 32


@torch.library.custom_op("speculators::round_gated", mutates_args=())
def round_gated(
    gate: Tensor,  # [tokens, intermediate], contiguous
    up: Tensor,  # [tokens, intermediate], contiguous
    max_value: float,
    min_scale: float,
) -> tuple[Tensor, Tensor]:
    """Round each token with the scale that maps its largest value to `max_value`.

    One operation of a compiled layer, which would read both inputs twice: a row has too many values
    for a kernel of the compiler to hold it.

    Returns:
        [tokens, intermediate], float8_e4m3fn; [tokens, 1], float32: scales.
    """
    values = torch.empty_like(gate, dtype=torch.float8_e4m3fn)
    scales = gate.new_empty(len(gate), 1, dtype=torch.float32)
    with torch.cuda.device_of(gate):
        round_into(gate, up, values, scales, max_value, min_scale)
    return values, scales


@round_gated.register_fake
def _(
    gate: Tensor,
    up: Tensor,  # noqa: ARG001
    max_value: float,  # noqa: ARG001
    min_scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate, dtype=torch.float8_e4m3fn),
        gate.new_empty(len(gate), 1, dtype=torch.float32),
    )


def round_into(
    gate: Tensor,
    up: Tensor,
    values: Tensor,  # [tokens, intermediate]: rounded to its dtype
    scales: Tensor,  # [tokens, 1], float32
    max_value: float,
    min_scale: float,
) -> None:
    """Launch the kernel of `round_gated`."""
    num_rows, size = gate.shape
    block = triton.next_power_of_2(size)
    _round_kernel[(num_rows,)](
        gate, up, values, scales, max_value, min_scale,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), MAX_WARPS),
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_value", "min_scale"])
def _round_kernel(
    gate, up, values, scales, max_value, min_scale, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Process one row; silu and the product are rounded as in eager layers."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    dtype = gate.dtype.element_ty
    g = tl.load(gate + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    value = (silu * u).to(dtype).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)) / max_value, min_scale)
    tl.store(scales + row, scale)
    tl.store(values + row * SIZE + i, (value / scale).to(values.dtype.element_ty), mask=inside)
