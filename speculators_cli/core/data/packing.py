"""Packing: assigns samples to packed sequences, from token counts only.

A plan is a pure function of lengths, seed, epoch and global batch, so it is the same on every rank,
and the order of samples does not depend on the number of ranks.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Samples per packing window: enough to fill sequences, few enough for a random order.
WINDOW = 4096

Packed = tuple[int, ...]  # sample ids of one packed sequence


@dataclass(frozen=True)
class PackingPlan:
    """The packed sequences of an epoch in training order."""

    sequences: tuple[Packed, ...]  # `global_batch` of them per optimizer step
    global_batch: int
    fill: float  # fraction of positions that are tokens

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of the epoch."""
        return len(self.sequences) // self.global_batch

    @property
    def fingerprint(self) -> str:
        """The same only for plans of the same sequences."""
        return hashlib.sha256(repr(self.sequences).encode()).hexdigest()


def plan_epoch(
    lengths: NDArray[np.int64],  # positions of each; longer ones are truncated
    *,
    total_seq_len: int,
    seed: int,
    epoch: int,
    global_batch: int,
) -> PackingPlan:
    """Pack all samples that have positions, in a different order in each epoch.

    Samples are shuffled, packed within windows, and the sequences shuffled. The last optimizer step
    is completed by splitting its sequences, so no sample is dropped or used twice.
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
        # The least filled sequences of a window are packed again in the next.
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
    """Add each sample to the fullest sequence that it fits in.

    Samples longer than half a sequence come first: no two of them share one. The others keep their
    random order, so that a sequence has samples of all lengths. Longest first would give each
    optimizer step samples of one length, and steps that differ.

    Returns:
        Sequences, the most filled first.
    """
    packed: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # ascending: what is left of a sequence, and its index
    for i in sorted(ids, key=lambda i: bool(2 * sizes[i] <= capacity)):
        size = int(sizes[i])
        at = bisect_left(rooms, (size, 0))
        room, index = rooms.pop(at) if at < len(rooms) else (capacity, len(packed))
        if index == len(packed):
            packed.append([])
        packed[index].append(i)
        insort(rooms, (room - size, index))
    return [tuple(packed[index]) for _, index in rooms]


def _part(packed: list[Packed], sizes: NDArray[np.int64], num_wanted: int) -> list[Packed]:
    """Split sequences, the most filled first, until there are `num_wanted`; some may be empty."""
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
