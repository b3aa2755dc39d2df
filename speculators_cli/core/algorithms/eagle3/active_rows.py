"""ActiveRows: which positions of a packed sequence can reach a loss, known before the forward pass.

TTT step k >= 1 reads earlier draft steps at its own position only, so a position none of whose
steps is scored is needed only for its step-0 keys and values, and the last steps of a position can
be left off. All of this follows from the loss mask, the lengths of documents and what was drawn, on
the host, so no step waits for the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.objective import scored_on_host
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.device import move
from speculators_cli.core.kernels.logit_chunks import Pairs
from speculators_cli.core.kernels.spans import Spans, document_bounds

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ActiveRows:
    """Index tensors of one packed sequence, on its device; all int64.

    `rows` are distinct, and each step has some: a sequence without a supervised token keeps one
    row, which no loss reads. They are ascending if all go through all steps; else those that go
    through more steps come first.
    """

    rows: Tensor  # [active]: positions that are scored in some TTT step
    counts: tuple[int, ...]  # for each step, how many of the first rows go through it
    passes: tuple[range, ...]  # steps that are computed at once
    places: Tensor  # [seq_len]: index of each position in `rows`, or -1
    num_inside: tuple[int, ...]  # for each step k, the first rows with row + k < seq_len
    shifted_rows: tuple[Tensor, ...]  # for each step k, row + k, at most the last position
    needed: Tensor  # [needed]: positions that are some row + k, ascending
    needed_rows: tuple[Tensor, ...]  # for each step k, where row + k is among `needed`
    pairs: Pairs  # of rows and steps
    cells: Tensor  # [pairs]: step * active + index of the row
    spans: tuple[Spans, ...]  # what the rows of each step attend to
    all_spans: Spans  # what all positions attend to

    def by_step(
        self,
        values: Tensor,  # [pairs]
    ) -> Tensor:
        """Values of pairs by step and row, zeros for others; [steps, active]."""
        shape = len(self.counts), len(self.rows)
        empty = values.new_zeros(shape[0] * shape[1])
        return empty.index_copy_(0, self.cells, values).view(shape)


def find_active_rows(
    batch: Batch, num_steps: int, *, are_later_at_once: bool = False
) -> ActiveRows:
    """Plan one packed sequence; enqueues a few small copies to the batch's device.

    Args:
        batch: On its device.
        num_steps: TTT steps.
        are_later_at_once: Whether all steps after the first are computed at once; else, one by one,
            with all rows in each.
    """
    seq_len, device = len(batch.host_mask), batch.input_ids.device
    bounds = document_bounds(batch.lengths, seq_len)

    targets = np.flatnonzero(batch.host_mask.numpy())
    scored = scored_on_host(batch, num_steps).numpy()  # [steps, seq_len]
    rows = np.flatnonzero(scored.any(axis=0))
    if not len(rows):
        rows = np.zeros(1, dtype=np.int64)
    counts = [len(rows)] * num_steps
    if batch.depths is not None:
        depths = batch.depths.numpy()[rows]
        rows = rows[np.argsort(-depths, kind="stable")]
        counts = [max(int((depths > step).sum()), 1) for step in range(num_steps)]

    shifted = np.minimum(rows + np.arange(num_steps)[:, None], seq_len - 1)  # [steps, active]
    is_needed = np.zeros(seq_len, dtype=bool)
    is_needed[shifted] = True
    needed = np.flatnonzero(is_needed)
    passes = [range(step, step + 1) for step in range(num_steps)]
    if are_later_at_once:
        passes = [range(1), range(1, num_steps)]
    pairs = _pair(rows, counts, passes)
    scores = scored[pairs.steps, rows[pairs.rows]]
    found = _places(targets, seq_len)[shifted[pairs.steps, pairs.rows]]
    parts = {
        "rows": rows,
        "places": _places(rows, seq_len),
        "shifted": shifted,
        "needed": needed,
        "needed_rows": _places(needed, seq_len)[shifted],
        "steps": pairs.steps,
        "targets": np.where(scores, found, -1),
        "order": pairs.order,
        "cells": pairs.steps * len(rows) + pairs.rows,
    }
    moved = _move(parts, device)
    spans = {count: Spans.of_rows(bounds, rows[:count], device) for count in {*counts}}
    ascending = np.sort(rows)
    return ActiveRows(
        rows=moved["rows"],
        counts=tuple(counts),
        passes=tuple(passes),
        places=moved["places"],
        num_inside=tuple(int((rows + k < seq_len).sum()) for k in range(num_steps)),
        shifted_rows=moved["shifted"].unbind(),
        needed=moved["needed"],
        needed_rows=moved["needed_rows"].unbind(),
        pairs=Pairs(
            steps=moved["steps"],
            targets=moved["targets"],
            order=moved["order"] if len(pairs.order) else None,
            inputs=pairs.inputs,
            num_steps=num_steps,
            first=pairs.first,
            target_bounds=(
                np.searchsorted(targets, ascending),
                np.searchsorted(targets, ascending + num_steps),
            ),
        ),
        cells=moved["cells"],
        spans=tuple(spans[count] for count in counts),
        all_spans=Spans.of_documents(bounds, device),
    )


@dataclass(frozen=True)
class _HostPairs:
    """Pairs of rows and steps, by position, then by step."""

    steps: Indices  # [pairs]
    rows: Indices  # [pairs]: indices of rows
    order: Indices  # [pairs]: where the input of each is, or nothing
    inputs: tuple[slice, ...]
    first: Indices  # [rows + 1]


def _pair(rows: Indices, counts: list[int], passes: list[range]) -> _HostPairs:
    """Pair the first `counts[k]` rows with each step k.

    If steps are computed one by one, the inputs of a row are beside each other; else, those of a
    step are.
    """
    num_steps, num_rows = len(counts), len(rows)
    by_position = np.argsort(rows, kind="stable")
    num_own = (by_position[:, None] < np.array(counts)).sum(axis=1)  # steps of each row
    first = np.concatenate(([0], np.cumsum(num_own)))
    own_rows = np.repeat(by_position, num_own)
    steps = np.arange(first[-1]) - np.repeat(first[:-1], num_own)
    if len(passes) == num_steps and counts[-1] == num_rows:
        inputs = tuple(slice(step, None, num_steps) for step in range(num_steps))
        return _HostPairs(steps, own_rows, np.zeros(0, dtype=np.int64), inputs, first)
    starts = np.concatenate(([0], np.cumsum(counts)))
    inputs = tuple(slice(int(starts[p.start]), int(starts[p.stop])) for p in passes)
    return _HostPairs(steps, own_rows, starts[steps] + own_rows, inputs, first)


def _places(rows: Indices, seq_len: int) -> Indices:
    """Index of each position in `rows`, or -1."""
    places = np.full(seq_len, -1)
    places[rows] = np.arange(len(rows))
    return places


def _move(parts: dict[str, Indices], device: torch.device) -> dict[str, Tensor]:
    """Copy arrays to the device in one asynchronous copy."""
    flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts.values()]))
    pieces = move(flat, device).split([part.size for part in parts.values()])
    return {
        name: piece.view(part.shape)
        for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }
