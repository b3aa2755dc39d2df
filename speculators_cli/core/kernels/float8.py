"""Matrices in float8 (e4m3) whose scales are powers of two, and their products.

Such a scale changes only the exponents of what is rounded: values and products have the same error
as with any scale, and a value keeps its bits when it is scaled again, unless it falls below the
smallest normal one. So a matrix is rounded once for all products: where a product sums over its
rows, their scales go into the other factor.

On CPU, the same rounding in plain PyTorch, and float32 products of what was rounded.
"""

from collections.abc import Sequence
from functools import cache
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
        num_warps=16,
    )  # fmt: skip
    return rounded


def round_weight(
    parts: Sequence[Tensor],  # each [out, in], any float dtype
    norm_weight: Tensor | None,  # [in], float32: multiplied into the weights
) -> RoundedWeight:
    """Round stacked weights with one scale, read from a bound of their largest value."""
    # One call for all parts, and all that depends on the bounds is computed where it is used.
    bounds = torch.stack(torch._foreach_norm(list(parts), torch.inf))  # noqa: SLF001
    gain = None if norm_weight is None else torch.linalg.vector_norm(norm_weight, torch.inf)
    size, num_outputs = parts[0].shape[1], sum(map(len, parts))
    by_output = Rounded.empty(num_outputs, size, bounds.device)
    by_input = Rounded.empty(size, num_outputs, bounds.device)
    if not has_kernels(bounds):
        largest = bounds.amax().float()
        scale = power_of_two(largest if gain is None else largest * gain)
        product = torch.cat([part.float() for part in parts])
        if norm_weight is not None:
            product = product * norm_weight
        by_output.values.copy_(_to_float8(product / scale))
        by_input.values.copy_(by_output.values.T)
        by_output.scales.fill_(scale)
        by_input.scales.fill_(scale)
        return RoundedWeight(by_output, by_input)
    start = 0
    for part in parts:
        grid = (triton.cdiv(len(part), TILE), triton.cdiv(size, TILE))
        launch(_round_weight_kernel, grid)(
            part, part.stride(0), bounds,
            bounds if norm_weight is None else norm_weight, bounds if gain is None else gain,
            *by_output, *by_input, start, len(part), num_outputs,
            HAS_NORM=norm_weight is not None,
            PARTS=len(parts),
            PARTS_BLOCK=triton.next_power_of_2(len(parts)),
            SIZE=size,
            TILE=TILE,
            num_warps=8,
        )  # fmt: skip
        start += len(part)
    return RoundedWeight(by_output, by_input)


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
    if into.is_cpu:
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

    def take_product(self, dtype: torch.dtype) -> Tensor:
        """`grad.T @ x` over all rows, [out, in], summed in float32; forgets them."""
        pairs, self.pairs = self.pairs, []
        (num_outputs, num_inputs) = (part.values.shape[1] for part in pairs[0])
        scales = [grad.scales * x.scales for grad, x in pairs]
        sizes = [-(-len(own) // MULTIPLE) * MULTIPLE for own in scales]
        if not any(sizes):
            return scales[0].new_zeros(num_outputs, num_inputs, dtype=dtype)
        largest = (scales[0] if len(scales) == 1 else torch.cat(scales)).amax()[None]
        grads = torch.empty(num_outputs, sum(sizes), dtype=FLOAT8, device=largest.device)
        inputs = torch.empty(num_inputs, sum(sizes), dtype=FLOAT8, device=largest.device)
        start = 0
        for own, size in zip(scales, sizes, strict=True):
            grad, x = pairs.pop(0)  # its memory is free after this turn
            here = slice(start, start + size)
            transpose(grad.values, x.values, own, largest, grads[:, here], inputs[:, here])
            start += size
        return multiply(Rounded(grads, largest), Rounded(inputs, _one(largest.device)), dtype)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def transpose(
    grad: Tensor,  # [rows, out], e4m3
    x: Tensor,  # [rows, in], e4m3
    scales: Tensor,  # [rows], float32: of the product of both
    largest: Tensor,  # [1], float32: of these scales; both are powers of two
    into_grad: Tensor,  # [out, at least `rows`], e4m3; zeros follow what is transposed
    into_x: Tensor,  # [in, at least `rows`], e4m3; the same
) -> None:
    """Transpose `grad` and `x * scales / largest`; the memory of both has the same stride."""
    num_rows = len(scales)
    if not has_kernels(grad):
        product = _to_float8(x.float() * (scales / largest)[:, None])
        for values, into in ((grad, into_grad), (product, into_x)):
            into[:, :num_rows], into[:, num_rows:] = values.T, 0
        return
    (num_outputs, num_columns), num_inputs = into_grad.shape, len(into_x)
    num_tiles = triton.cdiv(num_outputs, TILE) + triton.cdiv(num_inputs, TILE)
    launch(_transpose_kernel, (triton.cdiv(num_columns, TILE), num_tiles))(
        grad, x, scales, largest, into_grad, into_x, into_grad.stride(0), num_rows, num_columns,
        OUT=num_outputs,
        IN=num_inputs,
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


_MAX = tl.constexpr(MAX_FLOAT8)
_MIN_EXPONENT = tl.constexpr(MIN_EXPONENT)


@triton.jit
def scale_of(largest):
    """As `power_of_two`."""
    bits = (largest / _MAX).to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits + 0x7FFFFF) >> 23, _MIN_EXPONENT)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(to, value, scale, inside):
    """Store float32 values of a row with this scale."""
    tl.store(to, (value * (1.0 / scale)).to(tl.float8e4nv), mask=inside)


@triton.jit
def _round_rows_kernel(
    x, x_stride, values, scales,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row: one pass for the scale, one that rounds what the cache still holds."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for start in tl.static_range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)
        store_rounded(values + row * SIZE + i, value, scale, i < SIZE)


@triton.jit
def _load_weight(
    weight, weight_stride, norm_weight, inverse, row, i, num_rows,
    HAS_NORM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Load rows of a tile and round them."""
    inside = (row < num_rows)[:, None] & (i < SIZE)[None, :]
    at = weight + row.to(tl.int64)[:, None] * weight_stride + i[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        value *= tl.load(norm_weight + i, mask=i < SIZE, other=0.0)[None, :]
    return (value * inverse).to(tl.float8e4nv)


@triton.jit
def _round_weight_kernel(
    weight, weight_stride, bounds, norm_weight, norm_bound,
    by_output, output_scales, by_input, input_scales, start, num_rows, num_outputs,
    HAS_NORM: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Process one tile of a part, whose rows begin at `start`, for both layouts.

    Each layout rounds what it loads: where one rounded tile was stored in both, Triton 3.6 wrote
    other values into the second on an H200.
    """
    part = tl.arange(0, PARTS_BLOCK)
    largest = tl.max(tl.load(bounds + part, mask=part < PARTS, other=0.0).to(tl.float32))
    if HAS_NORM:
        largest *= tl.load(norm_bound)
    scale = scale_of(largest)
    inverse = 1.0 / scale
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    own = by_output + tl.cast(start, tl.int64) * SIZE
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = _load_weight(
        weight, weight_stride, norm_weight, inverse, row, i, num_rows, HAS_NORM, SIZE
    )
    inside = (row < num_rows)[:, None] & (i < SIZE)[None, :]
    tl.store(own + row.to(tl.int64)[:, None] * SIZE + i[None, :], value, mask=inside)
    first = tl.program_id(0) * TILE + 4 * tl.arange(0, TILE // 4)
    a = _load_weight(
        weight, weight_stride, norm_weight, inverse, first, i, num_rows, HAS_NORM, SIZE
    )
    b = _load_weight(
        weight, weight_stride, norm_weight, inverse, first + 1, i, num_rows, HAS_NORM, SIZE
    )
    c = _load_weight(
        weight, weight_stride, norm_weight, inverse, first + 2, i, num_rows, HAS_NORM, SIZE
    )
    d = _load_weight(
        weight, weight_stride, norm_weight, inverse, first + 3, i, num_rows, HAS_NORM, SIZE
    )
    _store_words(by_input + start, num_outputs, a, b, c, d, i, num_rows, SIZE, TILE)
    if tl.program_id(1) == 0:
        tl.store(output_scales + start + row, scale, mask=row < num_rows)
    if (tl.program_id(0) == 0) & (start == 0):
        tl.store(input_scales + i, scale, mask=i < SIZE)


@triton.jit
def _packed(a, b, c, d):
    """Four float8 values as one word, the first in its lowest byte."""
    a, b = a.to(tl.uint8, bitcast=True).to(tl.uint32), b.to(tl.uint8, bitcast=True).to(tl.uint32)
    c, d = c.to(tl.uint8, bitcast=True).to(tl.uint32), d.to(tl.uint8, bitcast=True).to(tl.uint32)
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def _store_words(
    out, out_stride, a, b, c, d, i, num_columns, SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store four rows each transposed, as words: bytes would go one by one."""
    word = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
    at = out.to(tl.pointer_type(tl.uint32)) + i.to(tl.int64)[:, None] * (out_stride // 4)
    inside = (i < SIZE)[:, None] & (word < num_columns // 4)[None, :]
    tl.store(at + word[None, :], tl.trans(_packed(a, b, c, d)), mask=inside)


@triton.jit
def _load_rows(
    values, scales, inverse, row, i, num_rows,
    HAS_SCALES: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    inside = (row < num_rows)[:, None] & (i < SIZE)[None, :]
    at = values + row.to(tl.int64)[:, None] * SIZE + i[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    if HAS_SCALES:
        factor = tl.load(scales + row, mask=row < num_rows, other=0.0) * inverse
        value = (value.to(tl.float32) * factor[:, None]).to(tl.float8e4nv)
    return value


@triton.jit
def _transpose_tile(
    values, scales, inverse, out, out_stride, tile, num_rows, num_columns,
    HAS_SCALES: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + 4 * tl.arange(0, TILE // 4)
    i = tile * TILE + tl.arange(0, TILE)
    a = _load_rows(values, scales, inverse, row, i, num_rows, HAS_SCALES, SIZE)
    b = _load_rows(values, scales, inverse, row + 1, i, num_rows, HAS_SCALES, SIZE)
    c = _load_rows(values, scales, inverse, row + 2, i, num_rows, HAS_SCALES, SIZE)
    d = _load_rows(values, scales, inverse, row + 3, i, num_rows, HAS_SCALES, SIZE)
    _store_words(out, out_stride, a, b, c, d, i, num_columns, SIZE, TILE)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["scales"])
def _transpose_kernel(
    grad, x, scales, largest, out_grad, out_x, out_stride, num_rows, num_columns,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Process one tile: of the gradients, or of the inputs after them."""
    tile = tl.program_id(1)
    num_tiles = tl.cdiv(OUT, TILE)
    inverse = 1.0 / tl.load(largest)
    if tile < num_tiles:
        _transpose_tile(
            grad, scales, inverse, out_grad, out_stride, tile, num_rows, num_columns,
            False, OUT, TILE,
        )  # fmt: skip
    else:
        _transpose_tile(
            x, scales, inverse, out_x, out_stride, tile - num_tiles, num_rows, num_columns,
            True, IN, TILE,
        )  # fmt: skip
