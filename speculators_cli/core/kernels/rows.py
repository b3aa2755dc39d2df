"""Gather and scatter-add of rows, each in one pass and without atomics."""

import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.launch import launch

BLOCK = 2048


def pick_rows(
    x: Tensor,  # [rows, ...]
    sources: Tensor,  # [picked], int64: a row of `x`, or -1 for zeros
) -> Tensor:
    """Gather the row of each source; [picked, ...]."""
    x = x.contiguous()
    size = x[0].numel()
    out = x.new_empty(len(sources), *x.shape[1:])
    grid = (len(sources), triton.cdiv(size, BLOCK))
    launch(_pick_kernel, grid)(x, sources, out, SIZE=size, BLOCK=BLOCK, num_warps=4)
    return out


def add_rows(
    x: Tensor,  # [rows, ...]
    places: Tensor,  # [rows], int64, distinct
    into: Tensor,  # [others, ...]
) -> None:
    """Add each row to the row at its place; `x` may be empty."""
    x = x.contiguous()
    size = into[0].numel()
    grid = (len(places), triton.cdiv(size, BLOCK))
    launch(_add_kernel, grid)(x, places, into, SIZE=size, BLOCK=BLOCK, num_warps=4)


@triton.jit(do_not_specialize_on_alignment=["sources"])
def _pick_kernel(x, sources, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + row)
    num_there = tl.where(source >= 0, SIZE, 0)
    value = tl.load(x + source * SIZE + i, mask=i < num_there, other=0.0)
    tl.store(out + row * SIZE + i, value, mask=i < SIZE)


@triton.jit(do_not_specialize_on_alignment=["places"])
def _add_kernel(x, places, into, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    value = tl.load(x + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    at = into + tl.load(places + row) * SIZE + i
    value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, value.to(into.dtype.element_ty), mask=inside)
