"""RMS norm of each head and rotary embedding, in one pass over all heads of a row, each way."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculators_cli.core.kernels.launch import launch

# Programs of a backward: each sums the weights' gradient over its rows; few partial sums remain.
NUM_PROGRAMS = 1024


Rope = tuple[Tensor, Tensor]  # cosine and sine by position, [positions, 1, head_dim], float32


class HeadGroups(NamedTuple):
    """The heads of a row that are normalised: groups, each with a weight of its own."""

    first: int  # heads of the first group
    other: int  # heads of each other group
    num_groups: int
    gap: int = 0  # heads between two groups, which are left out

    @property
    def sizes(self) -> list[int]:
        """Heads of each group."""
        return [self.first] + [self.other] * (self.num_groups - 1)


class HeadNorm(NamedTuple):
    """What is applied to the heads of rows: norms, then `layers.rotate`."""

    groups: HeadGroups
    weights: Tensor  # [groups, head_dim], float32
    eps: float
    rope: Rope
    positions: Tensor  # [rows], int64

    def apply(
        self,
        x: Tensor,  # [rows, width], each row contiguous
    ) -> list[Tensor]:
        """Return each group as a matrix of its own, each [rows, heads, head_dim]."""
        num_rows, sizes = len(x), self.groups.sizes
        head_dim = self.weights.shape[1]
        out = x.new_empty(sum(sizes) * num_rows, head_dim)
        launch(_head_norm_forward_kernel, (num_rows,))(
            x, x.stride(0), self.weights, self.eps, *self.rope, self.positions, out, num_rows,
            **self._constants(),
        )  # fmt: skip
        parts = out.split([size * num_rows for size in sizes])
        return [part.view(num_rows, -1, head_dim) for part in parts]

    def differentiate(
        self,
        x: Tensor,  # as in `apply`
        grad: Tensor,  # [rows, width], each row contiguous: of what became of `x`
    ) -> Tensor:
        """Replace `grad` by the gradient of `x`; return that of the weights."""
        num_programs = max(min(len(x), NUM_PROGRAMS), 1)
        shape = (num_programs, *self.weights.shape)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        launch(_head_norm_backward_kernel, (num_programs,))(
            x, x.stride(0), self.weights, self.eps, *self.rope, self.positions,
            grad, grad.stride(0), parts, len(x),
            GROUPS=self.groups.num_groups,
            **self._constants(),
        )  # fmt: skip
        return parts.sum(0)

    def _constants(self) -> dict[str, Any]:
        num_heads, half = sum(self.groups.sizes), self.weights.shape[1] // 2
        return {
            "FIRST": self.groups.first,
            "OTHER": self.groups.other,
            "GAP": self.groups.gap,
            "NUM_HEADS": num_heads,
            "HALF": half,
            "HEADS_BLOCK": triton.next_power_of_2(num_heads),
            "HALF_BLOCK": triton.next_power_of_2(half),
            "num_warps": 4,
        }


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _group_of(head, FIRST: tl.constexpr, OTHER: tl.constexpr):
    """The group of each head, and its place there."""
    is_first = head < FIRST
    group = tl.where(is_first, 0, 1 + (head - FIRST) // OTHER)
    return group, tl.where(is_first, head, (head - FIRST) % OTHER)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions"])
def _head_norm_forward_kernel(
    x, x_stride, weights, eps, cos, sin, positions, out, num_rows,
    FIRST: tl.constexpr,
    OTHER: tl.constexpr,
    GAP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row; pairs (i, i + head_dim/2) of a head are rotated by one angle."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = i < HALF
    inside = (head < NUM_HEADS) & is_half
    group, slot = _group_of(head, FIRST, OTHER)
    at = (head + group * GAP) * 2 * HALF + i
    own = group * 2 * HALF + i
    angle = tl.load(positions + row) * 2 * HALF + i
    c, s = _load(cos, angle, is_half), _load(sin, angle, is_half)
    x += row * x_stride
    first, second = _load(x, at, inside), _load(x, at + HALF, inside)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
    first = first * scale * _load(weights, own, inside)
    second = second * scale * _load(weights, own + HALF, inside)
    # Heads of groups before, of all rows; then those of rows before.
    before = (head - slot).to(tl.int64) * num_rows + row * tl.where(group == 0, FIRST, OTHER)
    to = (before + slot) * 2 * HALF + i
    tl.store(out + to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions"])
def _head_norm_backward_kernel(
    x, x_stride, weights, eps, cos, sin, positions, grad, grad_stride, parts, num_rows,
    GROUPS: tl.constexpr,
    FIRST: tl.constexpr,
    OTHER: tl.constexpr,
    GAP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate back, then with y = x s: dx = s (g dy - y mean(g dy y)); dg = sum of dy y."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = i < HALF
    inside = (head < NUM_HEADS) & is_half
    group, _slot = _group_of(head, FIRST, OTHER)
    at = (head + group * GAP) * 2 * HALF + i
    own = group * 2 * HALF + i
    first_total = tl.zeros([HEADS_BLOCK, HALF_BLOCK], dtype=tl.float32)
    second_total = tl.zeros([HEADS_BLOCK, HALF_BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        angle = tl.load(positions + row) * 2 * HALF + i
        c, s = _load(cos, angle, is_half), _load(sin, angle, is_half)
        to = row * grad_stride + at
        turned_first, turned_second = _load(grad, to, inside), _load(grad, to + HALF, inside)
        first_dy = turned_first * c + turned_second * s
        second_dy = turned_second * c - turned_first * s
        source = row * x_stride + at
        first, second = _load(x, source, inside), _load(x, source + HALF, inside)
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
        first, second = first * scale, second * scale
        first_total += first_dy * first
        second_total += second_dy * second
        # Read anew for each row, from the cache: kept, they would take a fifth of the registers.
        first_dy *= _load(weights, own, inside)
        second_dy *= _load(weights, own + HALF, inside)
        mean = tl.sum(first_dy * first, axis=1) + tl.sum(second_dy * second, axis=1)
        mean = (mean / (2 * HALF))[:, None]
        first_dx = scale * (first_dy - first * mean)
        second_dx = scale * (second_dy - second * mean)
        tl.store(grad + to, first_dx.to(grad.dtype.element_ty), mask=inside)
        tl.store(grad + to + HALF, second_dx.to(grad.dtype.element_ty), mask=inside)
    j = tl.arange(0, HALF_BLOCK)
    for index in tl.static_range(GROUPS):
        part = parts + (tl.program_id(0) * GROUPS + index) * 2 * HALF + j
        is_own = group == index
        tl.store(part, tl.sum(tl.where(is_own, first_total, 0.0), axis=0), mask=j < HALF)
        tl.store(part + HALF, tl.sum(tl.where(is_own, second_total, 0.0), axis=0), mask=j < HALF)
