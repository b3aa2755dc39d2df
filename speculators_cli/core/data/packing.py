"""Packing: which samples share a packed sequence. Token counts only, no tensors.

A plan is a pure function of lengths, seed, epoch and global batch, so every rank makes the same
one, and the order of samples does not depend on the number of ranks.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Samples packed among themselves: enough to fill sequences, few enough to stay random.
WINDOW = 4096

Packed = tuple[int, ...]  # sample ids of one packed sequence


@dataclass(frozen=True)
class PackingPlan:
    """The packed sequences of an epoch in the order they are trained on."""

    sequences: tuple[Packed, ...]  # global_batch of them an optimizer step
    global_batch: int
    fill: float  # share of positions that hold a token

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self.sequences) // self.global_batch


def plan_epoch(
    lengths: NDArray[np.int64],  # [samples]: positions of each; longer ones count as cut
    *,
    total_seq_len: int,
    seed: int,
    epoch: int,
    global_batch: int,
) -> PackingPlan:
    """Pack all samples that have a position, in an order of their own for each epoch.

    Samples are shuffled, packed longest first within windows, and the sequences shuffled. The last
    optimizer step is filled up by parting its sequences, so no sample is dropped or used twice.
    """
    rng = np.random.default_rng((seed, epoch))
    sizes = np.minimum(lengths, total_seq_len)
    order = rng.permutation(np.flatnonzero(sizes))
    packed: list[Packed] = []
    carried: list[int] = []
    for start in range(0, len(order), WINDOW):
        window = [*carried, *order[start : start + WINDOW].tolist()]
        full = _pack(window, sizes, total_seq_len)
        is_last = start + WINDOW >= len(order)
        # The worst filled sequences of a window find better company in the next.
        keep = len(full) if is_last else max(len(full) * 31 // 32, 1)
        packed += full[:keep]
        carried = [i for sequence in full[keep:] for i in sequence]
    rng.shuffle(packed)
    missing = -len(packed) % global_batch
    tail = len(packed) // global_batch * global_batch
    if missing:
        packed[tail:] = _part(packed[tail:], sizes, global_batch)
    num_positions = max(len(packed) * total_seq_len, 1)
    return PackingPlan(tuple(packed), global_batch, float(sizes.sum()) / num_positions)


def _pack(ids: Sequence[int], sizes: NDArray[np.int64], capacity: int) -> list[Packed]:
    """Open each sequence with the longest sample left, then add the longest that fits.

    Returns:
        Sequences, the fullest first.
    """
    # Ties by position in the shuffled order, which makes the sort total.
    by_size = sorted(range(len(ids)), key=lambda k: (sizes[ids[k]], k))
    left_ids = [ids[k] for k in by_size]
    left_sizes = [int(sizes[i]) for i in left_ids]
    packed: list[tuple[int, Packed]] = []
    while left_ids:
        sequence, room = [left_ids.pop()], capacity - left_sizes.pop()
        while (at := bisect_right(left_sizes, room) - 1) >= 0:
            sequence.append(left_ids.pop(at))
            room -= left_sizes.pop(at)
        packed.append((room, tuple(sequence)))
    packed.sort(key=lambda x: x[0])
    return [sequence for _, sequence in packed]


def _part(packed: list[Packed], sizes: NDArray[np.int64], num_wanted: int) -> list[Packed]:
    """Part sequences in two, the fullest first, until there are `num_wanted`; some may be empty."""
    packed = list(packed)
    while len(packed) < num_wanted:
        fullest = max(packed, key=lambda ids: (len(ids) > 1, int(sum(sizes[i] for i in ids))))
        if len(fullest) < 2:
            packed.append(())
            continue
        packed.remove(fullest)
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for i in sorted(fullest, key=lambda i: -sizes[i]):
            emptier = int(tokens[1] < tokens[0])
            halves[emptier].append(i)
            tokens[emptier] += int(sizes[i])
        packed += map(tuple, halves)
    return packed
