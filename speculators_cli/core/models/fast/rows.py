"""Moving rows: a row or zeros from each source, a row to each place. One pass, no atomics."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def pick_rows(
    x: Tensor,  # [rows, ...]
    sources: Tensor,  # [picked], int64: a row of `x`, or -1 for zeros
) -> Tensor:
    """The row of each source; [picked, ...]."""
    x = x.contiguous()
    size = x[0].numel()
    out = x.new_empty(len(sources), *x.shape[1:])
    grid = (len(sources), triton.cdiv(size, BLOCK))
    _pick_kernel[grid](x, sources, out, SIZE=size, BLOCK=BLOCK, num_warps=4)
    return out


def put_rows(
    x: Tensor,  # [rows, ...]
    places: Tensor,  # [rows], int64, distinct but for -1: left out
    into: Tensor,  # [others, ...]
    *,
    add: bool,
) -> None:
    """Write each row to its place, or add it to what stands there."""
    x = x.contiguous()
    size = x[0].numel()
    grid = (len(places), triton.cdiv(size, BLOCK))
    _put_kernel[grid](x, places, into, SIZE=size, BLOCK=BLOCK, ADD=add, num_warps=4)


@triton.jit
def _pick_kernel(x, sources, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + row)
    num_there = tl.where(source >= 0, SIZE, 0)
    value = tl.load(x + source * SIZE + i, mask=i < num_there, other=0.0)
    tl.store(out + row * SIZE + i, value, mask=i < SIZE)


@triton.jit
def _put_kernel(x, places, into, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + row)
    inside = i < tl.where(place >= 0, SIZE, 0)
    value = tl.load(x + row * SIZE + i, mask=inside, other=0.0)
    into += place * SIZE
    if ADD:
        there = tl.load(into + i, mask=inside, other=0.0)
        value = (value.to(tl.float32) + there.to(tl.float32)).to(into.dtype.element_ty)
    tl.store(into + i, value, mask=inside)
