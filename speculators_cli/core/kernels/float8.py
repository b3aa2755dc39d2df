"""Matrices in float8 (e4m3) whose scales are powers of two, and their products.

Such a scale changes only the exponents of what is rounded: values and products have the same error
as with any scale, and a value keeps its bits when it is scaled again, unless it falls below the
smallest normal one. So a matrix is rounded once for all products: where a product sums over its
rows, their scales go into the other factor.

On CPU, the same rounding in plain PyTorch, and float32 products of what was rounded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.device import has_kernels
from speculators_cli.core.kernels.launch import launch

FLOAT8 = torch.float8_e4m3fn
MAX_FLOAT8 = 448.0
# The smallest scale: what is smaller by far than 2^-60 becomes zero. The product of two scales is a
# normal float32.
MIN_EXPONENT = 127 - 60
MULTIPLE = 16  # of the sizes of factors, for the matrix product
# Sums with fewer bits add a hundredth to the error of rounding the factors.
USE_FAST_ACCUM = True
BLOCK = 4096
TILE = 128


class Rounded(NamedTuple):
    """A rounded matrix: `values * scales[:, None]`."""

    values: Tensor  # [rows, width], e4m3
    scales: Tensor  # [rows], or [1] for all of them; float32

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> "Rounded":
        """Memory for a matrix with a scale per row."""
        return cls(
            torch.empty(num_rows, width, dtype=FLOAT8, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
        )


class RoundedWeight(NamedTuple):
    """A rounded weight in both layouts; all scales are the same number.

    A scale per output would go into the gradient of that output before it is rounded: gradients of
    small weights would underflow.
    """

    by_output: Rounded  # [out, in]
    by_input: Rounded  # [in, out]


def round_rows(
    x: Tensor,  # [rows, width], each row contiguous
) -> Rounded:
    """Round each row with the smallest scale for its largest value.

    Products of a row with NaN or Inf are NaN.
    """
    if not has_kernels(x):
        scales = power_of_two(x.abs().amax(-1).float())
        return Rounded(_to_float8(x.float() / scales[:, None]), scales)
    num_rows, size = x.shape
    rounded = Rounded.empty(num_rows, size, x.device)
    launch(_round_rows_kernel, (num_rows,))(
        x, x.stride(0), *rounded,
        SIZE=size,
        BLOCK=min(BLOCK, triton.next_power_of_2(size)),
        MAX_FLOAT8=MAX_FLOAT8,
        MIN_EXPONENT=MIN_EXPONENT,
        num_warps=16,
    )  # fmt: skip
    return rounded


def round_weight(
    parts: Sequence[Tensor],  # each [out, in], any float dtype
    norm_weight: Tensor | None,  # [in], float32: multiplied into the weights
) -> RoundedWeight:
    """Round stacked weights with one scale, read from a bound of their largest value."""
    bounds = torch.stack([torch.linalg.vector_norm(part, torch.inf) for part in parts])
    largest = bounds.amax().float()
    if norm_weight is not None:
        largest = largest * norm_weight.abs().amax()
    scale = power_of_two(largest)
    size, num_outputs = parts[0].shape[1], sum(map(len, parts))
    by_output = torch.empty(num_outputs, size, dtype=FLOAT8, device=scale.device)
    by_input = torch.empty(size, num_outputs, dtype=FLOAT8, device=scale.device)
    start = 0
    for part in parts:
        here = by_output[start : start + len(part)]
        if has_kernels(part):
            launch(_round_weight_kernel, (len(part),))(
                part, part.stride(0), part if norm_weight is None else norm_weight, scale, here,
                HAS_NORM=norm_weight is not None,
                SIZE=size,
                BLOCK=min(BLOCK, triton.next_power_of_2(size)),
                num_warps=8,
            )  # fmt: skip
        else:
            product = part.float() if norm_weight is None else part * norm_weight
            here.copy_(_to_float8(product / scale))
        start += len(part)
    transpose(by_output, by_input)
    return RoundedWeight(
        Rounded(by_output, scale.repeat(num_outputs)), Rounded(by_input, scale.repeat(size))
    )


def multiply(
    rows: Rounded,  # [rows, width]
    others: Rounded,  # [others, width]
    dtype: torch.dtype,
    *,
    into: Tensor | None = None,  # [rows, others]
) -> Tensor:
    """`rows @ others.T`, summed in float32; [rows, others].

    On a GPU, width and others are multiples of 16, and both have a scale per row, or both one.
    """
    if into is None:
        into = rows.values.new_empty(len(rows.values), len(others.values), dtype=dtype)
    if not has_kernels(into):
        factors = [part.values.float() * part.scales[:, None] for part in (rows, others)]
        return into.copy_(factors[0] @ factors[1].T)
    if rows.values.numel() == 0 or into.is_meta:  # torch has no such product of meta tensors
        return into.zero_()
    torch._scaled_mm(  # noqa: SLF001 - public only since torch 2.12
        rows.values, others.values.T, rows.scales.view(-1, 1), others.scales.view(1, -1),
        out_dtype=dtype, use_fast_accum=USE_FAST_ACCUM, out=into,
    )  # fmt: skip
    return into


class RoundedPairs:
    """Rounded gradients of a product and its rounded inputs, for the gradient of its weight.

    It is one product over the rows of all uses: torch has no product of float8 matrices that adds
    to a float32 matrix.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Rounded, Rounded]] = []

    def add(
        self,
        grad: Rounded,  # [rows, out]
        x: Rounded,  # [rows, in]
    ) -> None:
        """Keep the rows of one use."""
        self.pairs.append((grad, x))

    def take_product(self) -> Tensor:
        """`grad.T @ x` over all rows, [out, in], float32; forgets them."""
        pairs, self.pairs = self.pairs, []
        (num_outputs, num_inputs) = (part.values.shape[1] for part in pairs[0])
        scales = torch.cat([grad.scales * x.scales for grad, x in pairs])
        if not len(scales):
            return scales.new_zeros(num_outputs, num_inputs)
        largest = scales.amax()[None]
        factors = (scales / largest).split([len(x.scales) for _, x in pairs])
        sizes = [-(-len(part) // MULTIPLE) * MULTIPLE for part in factors]
        grads = torch.empty(num_outputs, sum(sizes), dtype=FLOAT8, device=scales.device)
        inputs = torch.empty(num_inputs, sum(sizes), dtype=FLOAT8, device=scales.device)
        start = 0
        for factor, size in zip(factors, sizes, strict=True):
            grad, x = pairs.pop(0)  # its memory is free after this turn
            here = slice(start, start + size)
            transpose(grad.values, grads[:, here])
            transpose(x.values, inputs[:, here], factors=factor)
            start += size
        one = torch.ones_like(largest)
        return multiply(Rounded(grads, largest), Rounded(inputs, one), torch.float32)


def transpose(
    values: Tensor,  # [rows, width], e4m3
    into: Tensor,  # [width, at least `rows`], e4m3; zeros follow what is transposed
    *,
    factors: Tensor | None = None,  # [rows], float32: powers of two
) -> None:
    """Transpose `values * factors`."""
    num_rows, size = values.shape
    if not has_kernels(values):
        product = values if factors is None else _to_float8(values.float() * factors[:, None])
        into[:, :num_rows], into[:, num_rows:] = product.T, 0
        return
    grid = (triton.cdiv(into.shape[1], TILE), triton.cdiv(size, TILE))
    launch(_transpose_kernel, grid)(
        values, values if factors is None else factors, into, into.stride(0),
        num_rows, into.shape[1],
        HAS_FACTORS=factors is not None,
        SIZE=size,
        TILE=TILE,
        num_warps=8,
    )  # fmt: skip


def power_of_two(
    largest: Tensor,  # float32, not negative
) -> Tensor:
    """The smallest powers of two by which such values, divided, are at most `MAX_FLOAT8`."""
    bits = (largest / MAX_FLOAT8).view(torch.int32)
    exponents = ((bits + 0x7FFFFF) >> 23).clamp(min=MIN_EXPONENT)  # rounded up
    return (exponents << 23).view(torch.float32)


def _to_float8(x: Tensor) -> Tensor:
    return x.to(FLOAT8)


@triton.jit
def _round_rows_kernel(
    x, x_stride, values, scales,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_FLOAT8: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
):  # fmt: skip
    """Process one row: one pass for the scale, one that rounds what the cache still holds."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    bits = (tl.max(largest) / MAX_FLOAT8).to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits + 0x7FFFFF) >> 23, MIN_EXPONENT)  # as `power_of_two`
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(scales + row, scale)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32) * (1.0 / scale)
        tl.store(values + row * SIZE + i, value.to(tl.float8e4nv), mask=i < SIZE)


@triton.jit
def _round_weight_kernel(
    weight, weight_stride, norm_weight, scale, rounded,
    HAS_NORM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row."""
    row = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / tl.load(scale)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < SIZE
        value = tl.load(weight + row * weight_stride + i, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            value *= tl.load(norm_weight + i, mask=inside, other=0.0)
        tl.store(rounded + row * SIZE + i, (value * inverse).to(tl.float8e4nv), mask=inside)


@triton.jit
def _packed(a, b, c, d):
    """Four float8 values as one word, the first in its lowest byte."""
    a, b = a.to(tl.uint8, bitcast=True).to(tl.uint32), b.to(tl.uint8, bitcast=True).to(tl.uint32)
    c, d = c.to(tl.uint8, bitcast=True).to(tl.uint32), d.to(tl.uint8, bitcast=True).to(tl.uint32)
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def _load_rows(
    values, factors, row, i, num_rows,
    HAS_FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    inside = (row < num_rows)[:, None] & (i < SIZE)[None, :]
    at = values + row.to(tl.int64)[:, None] * SIZE + i[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    if HAS_FACTORS:
        factor = tl.load(factors + row, mask=row < num_rows, other=0.0)
        value = (value.to(tl.float32) * factor[:, None]).to(tl.float8e4nv)
    return value


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["factors"])
def _transpose_kernel(
    values, factors, out, out_stride, num_rows, num_columns,
    HAS_FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Process one tile. Four rows at a time are stored as words: bytes would go one by one."""
    row = tl.program_id(0) * TILE + 4 * tl.arange(0, TILE // 4)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a = _load_rows(values, factors, row, i, num_rows, HAS_FACTORS, SIZE)
    b = _load_rows(values, factors, row + 1, i, num_rows, HAS_FACTORS, SIZE)
    c = _load_rows(values, factors, row + 2, i, num_rows, HAS_FACTORS, SIZE)
    d = _load_rows(values, factors, row + 3, i, num_rows, HAS_FACTORS, SIZE)
    word = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
    at = out.to(tl.pointer_type(tl.uint32)) + i.to(tl.int64)[:, None] * (out_stride // 4)
    inside = (i < SIZE)[:, None] & (word < num_columns // 4)[None, :]
    tl.store(at + word[None, :], tl.trans(_packed(a, b, c, d)), mask=inside)
