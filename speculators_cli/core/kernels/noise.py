"""Non-finite values: detection and zeroing; and noise. One pass over the states each."""

import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.launch import launch

BLOCK = 1024


def mark_broken(
    states: Tensor,  # [rows, width], contiguous
    document_ids: Tensor,  # [rows], int64; padding is -1
    is_broken: Tensor,  # [documents], bool: set where a document has a value that is not finite
) -> None:
    """Find NaN and Inf."""
    rows, width = states.shape
    launch(_mark_kernel, (rows,))(
        states, document_ids, is_broken, WIDTH=width,
        BLOCK=min(4 * BLOCK, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip


def zero_broken(
    states: Tensor,  # [rows, width], contiguous; changed in place
    document_ids: Tensor,  # padding, -1, is unchanged
    is_broken: Tensor,  # [documents], bool
) -> None:
    """Zero the rows of documents with non-finite values."""
    rows, width = states.shape
    launch(_zero_kernel, (rows, triton.cdiv(width, BLOCK)))(
        states, document_ids, is_broken, WIDTH=width, BLOCK=BLOCK, num_warps=4
    )


def perturb(
    states: Tensor,  # [seq_len, width], contiguous; changed in place
    document_ids: Tensor,  # padding, -1, is unchanged
    position_ids: Tensor,  # [seq_len], int64
    is_broken: Tensor,  # [documents], bool
    keys: Tensor,  # seeds of the documents' noise
    std: float,
) -> None:
    """Zero rows of documents with non-finite values; add uniform noise in [-std, std] elsewhere.

    The noise of a row depends only on its document's key and its position (Philox).
    """
    seq_len, width = states.shape
    quarter = triton.cdiv(width, 4)
    launch(_perturb_kernel, (seq_len, triton.cdiv(quarter, BLOCK)))(
        states, document_ids, position_ids, is_broken, keys, std,
        WIDTH=width, QUARTER=quarter, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _mark_kernel(
    states, document_ids, is_broken,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    document = tl.load(document_ids + row)
    if document >= 0:
        found = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, WIDTH, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(states + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
            # Comparisons with NaN are false.
            found |= tl.where(tl.abs(value) < float("inf"), 0, 1)
        if tl.max(found) > 0:
            tl.store(is_broken + document, True)


@triton.jit
def _zero_kernel(states, document_ids, is_broken, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    document = tl.load(document_ids + row)
    if tl.load(is_broken + document, mask=document >= 0, other=0) != 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        nothing = tl.zeros([BLOCK], dtype=tl.float32).to(states.dtype.element_ty)
        tl.store(states + row * WIDTH + i, nothing, mask=i < WIDTH)


@triton.jit(do_not_specialize=["std"])
def _perturb_kernel(
    states, document_ids, position_ids, is_broken, keys, std,
    WIDTH: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    document = tl.load(document_ids + row)
    if document >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        keep = 1.0 - tl.load(is_broken + document).to(tl.float32)
        seed = tl.load(keys + document) + tl.load(position_ids + row)
        # One call of the generator returns four numbers, a quarter of the row's width apart.
        draws = tl.rand4x(seed, column)
        for part in tl.static_range(4):
            at = states + row * WIDTH + part * QUARTER + column
            inside = (column < QUARTER) & (part * QUARTER + column < WIDTH)
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            # NaN must be replaced: multiplied by 0, it would remain.
            value = tl.where(keep > 0.0, value + (2.0 * draws[part] - 1.0) * std, 0.0)
            tl.store(at, value.to(states.dtype.element_ty), mask=inside)
