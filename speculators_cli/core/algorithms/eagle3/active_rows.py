"""ActiveRows: which positions of a packed sequence can reach a loss, known before the forward pass.

TTT step k >= 1 reads earlier draft steps at its own position only, so a position none of whose
steps is scored is needed only for its step-0 keys and values. All of this follows from the loss
mask and the lengths of documents, both on the host, so no step waits for the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.objective import scored_positions
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.device import move
from speculators_cli.core.kernels.spans import Spans, document_bounds

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ActiveRows:
    """Index tensors of one packed sequence, on its device; all int64.

    `rows` are ascending and distinct, and never empty: a sequence without a supervised token keeps
    one row, which no loss reads.
    """

    rows: Tensor  # [active]: positions that are scored in some TTT step
    places: Tensor  # [seq_len]: index of each position in `rows`, or -1
    num_inside: tuple[int, ...]  # for each step k, the first rows with row + k < seq_len
    shifted_rows: tuple[Tensor, ...]  # for each step k, row + k, at most the last position
    needed: Tensor  # [needed]: positions that are some row + k, ascending
    needed_rows: tuple[Tensor, ...]  # for each step k, where row + k is among `needed`
    targets: Tensor  # [active, steps]: which of the batch's targets a step scores, or -1
    target_bounds: tuple[Indices, Indices]  # [active], on the host: targets at row .. row + steps-1
    spans: Spans  # what the active rows attend to
    all_spans: Spans  # what all positions attend to

    def targets_of(self, start: int, stop: int) -> tuple[int, int]:
        """Bounds of the targets that rows `start` to `stop` score, at least one row."""
        first, last = self.target_bounds
        return int(first[start]), int(last[stop - 1])


def find_active_rows(batch: Batch, num_steps: int) -> ActiveRows:
    """Plan one packed sequence; enqueues a few small copies to the batch's device."""
    seq_len, device = len(batch.host_mask), batch.input_ids.device
    bounds = document_bounds(batch.lengths, seq_len)
    documents = torch.from_numpy(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)))

    targets = np.flatnonzero(batch.host_mask.numpy())
    scored = scored_positions(batch.host_mask, documents, num_steps).numpy()  # [steps, seq_len]
    rows = np.flatnonzero(scored.any(axis=0))
    if not len(rows):
        rows = np.zeros(1, dtype=np.int64)

    shifted = np.minimum(rows + np.arange(num_steps)[:, None], seq_len - 1)  # [steps, active]
    is_needed = np.zeros(seq_len, dtype=bool)
    is_needed[shifted] = True
    needed = np.flatnonzero(is_needed)
    parts = {
        "rows": rows,
        "places": _places(rows, seq_len),
        "shifted": shifted,
        "needed": needed,
        "needed_rows": _places(needed, seq_len)[shifted],
        "targets": np.where(scored[:, rows], _places(targets, seq_len)[shifted], -1).T,
    }
    moved = _move(parts, device)
    return ActiveRows(
        rows=moved["rows"],
        places=moved["places"],
        num_inside=tuple(int(np.searchsorted(rows, seq_len - k)) for k in range(num_steps)),
        shifted_rows=moved["shifted"].unbind(),
        needed=moved["needed"],
        needed_rows=moved["needed_rows"].unbind(),
        targets=moved["targets"],
        target_bounds=(
            np.searchsorted(targets, rows),
            np.searchsorted(targets, rows + num_steps),
        ),
        spans=Spans.of_rows(bounds, rows, device),
        all_spans=Spans.of_documents(bounds, device),
    )


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
