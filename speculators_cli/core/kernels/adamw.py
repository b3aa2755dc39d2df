"""AdamW in one pass over parameters, their gradients and moments (arXiv 1711.05101, algorithm 2).

The update is that of PyTorch's fused AdamW, closer to the memory bandwidth: the optimizer only
moves 28 bytes per parameter, or 26. All tensors of a group are updated by one launch.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.device import move
from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.shards import local_rows

BLOCK = 4096
ALIGNMENT = 16  # of sizes and addresses, for wide loads


def update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],  # float32 or bfloat16
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    grad_scale: Tensor,  # float32 scalar: gradients are divided by it
    found_inf: Tensor,  # float32 scalar: where it is 1, nothing changes
    corrections: Tensor,  # [2], float32: 1 - beta^step
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update this rank's rows of parameters and their moments, which are float32."""
    rows = [
        (own, gradient.contiguous(), mean, square)
        for own, gradient, mean, square in (
            map(local_rows, row) for row in zip(parameters, gradients, means, squares, strict=True)
        )
    ]
    # A launch reads gradients of one dtype.
    for dtype in dict.fromkeys(row[1].dtype for row in rows):
        table = _Table.of([row for row in rows if row[1].dtype == dtype])
        if table.num_programs == 0:
            continue
        num_tensors = table.numbers.shape[1]
        launch(_adamw_kernel, (table.num_programs,))(
            move(table.numbers, corrections.device), num_tensors,
            grad_scale, found_inf, corrections, lr, *betas, eps, 1.0 - lr * weight_decay,
            TENSORS=triton.next_power_of_2(num_tensors),
            IN_BFLOAT16=dtype == torch.bfloat16,
            IS_ALIGNED=table.is_aligned,
            BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip


class _Table(NamedTuple):
    """Where the tensors of a launch are, for the kernel."""

    numbers: Tensor  # [6, tensors], int64: the first program of each, its size, four addresses
    num_programs: int
    is_aligned: bool  # whether sizes and addresses permit wide loads

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[Tensor]],  # a parameter, its gradient, its moments; contiguous
    ) -> "_Table":
        """Describe them, on the host."""
        sizes = [row[0].numel() for row in rows]
        ends = [0, *accumulate(triton.cdiv(size, BLOCK) for size in sizes)]
        addresses = [[tensor.data_ptr() for tensor in row] for row in rows]
        numbers = [ends[:-1], sizes, *zip(*addresses, strict=True)]
        is_aligned = not any(x % ALIGNMENT for x in chain(sizes, *addresses))
        return cls(torch.tensor(numbers, dtype=torch.int64), ends[-1], is_aligned)


@triton.jit
def _at(table, row, num_tensors, index, i, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Addresses of values of a tensor."""
    address = tl.load(table + row * num_tensors + index)
    at = address.to(tl.pointer_type(DTYPE)) + i
    return tl.multiple_of(at, 16) if IS_ALIGNED else at


@triton.jit(do_not_specialize=["num_tensors", "lr", "decay"])
def _adamw_kernel(
    table, num_tensors, grad_scale, found_inf, corrections, lr, beta1, beta2, eps, decay,
    TENSORS: tl.constexpr,
    IN_BFLOAT16: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process a block of one of the tensors."""
    if tl.load(found_inf) == 0:
        tensor = tl.arange(0, TENSORS)
        program = tl.program_id(0)
        first = tl.load(table + tensor, mask=tensor < num_tensors, other=program + 1)
        index = tl.sum((first <= program).to(tl.int32)) - 1
        begin = tl.load(table + index)
        i = (program - begin) * BLOCK + tl.arange(0, BLOCK)
        size = tl.load(table + num_tensors + index)
        inside = i < (tl.multiple_of(size, 16) if IS_ALIGNED else size)
        gradient_dtype: tl.constexpr = tl.bfloat16 if IN_BFLOAT16 else tl.float32
        parameter = _at(table, 2, num_tensors, index, i, tl.float32, IS_ALIGNED)
        gradient = _at(table, 3, num_tensors, index, i, gradient_dtype, IS_ALIGNED)
        mean = _at(table, 4, num_tensors, index, i, tl.float32, IS_ALIGNED)
        square = _at(table, 5, num_tensors, index, i, tl.float32, IS_ALIGNED)
        g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32) / tl.load(grad_scale)
        m = tl.load(mean, mask=inside, other=0.0)
        v = tl.load(square, mask=inside, other=0.0)
        p = tl.load(parameter, mask=inside, other=0.0)
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        root = tl.sqrt(v / tl.load(corrections + 1)) + eps
        p = p * decay - lr * (m / tl.load(corrections)) / root
        tl.store(mean, m, mask=inside)
        tl.store(square, v, mask=inside)
        tl.store(parameter, p, mask=inside)
