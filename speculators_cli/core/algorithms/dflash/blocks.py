"""Blocks: which anchors of a packed sequence are trained, and what their tokens are scored against.

All of it follows from masks and lengths on the host, so no step waits for the device.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.dflash.attention import BlockSpans
from speculators_cli.core.algorithms.objective import scored_on_host
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.noise import draw_numbers
from speculators_cli.core.kernels.device import move
from speculators_cli.core.kernels.spans import document_bounds


@dataclass(frozen=True)
class Blocks:
    """The blocks of one packed sequence; index tensors are on its device.

    There is at least one anchor: a sequence without a supervised token keeps a row that no loss
    reads.
    """

    anchors: Tensor  # [anchors], int64: rows, ascending
    targets: Tensor  # [anchors, predictions], int64: which of the batch's targets, or -1
    target_bounds: tuple[NDArray[np.int64], NDArray[np.int64]]  # [anchors], on the host
    spans: BlockSpans

    def targets_of(self, start: int, stop: int) -> tuple[int, int]:
        """Bounds of the targets that anchors `start` to `stop` score, at least one anchor."""
        first, last = self.target_bounds
        return int(first[start]), int(last[stop - 1])


def draw_anchors(batch: Batch, num_anchors: int, *, seed: int, epoch: int) -> Batch:
    """Draw anchors among the supervised positions of a batch, uniformly, without replacement.

    Every position has a random number that depends on the seed, the epoch and its sample only, and
    those with the smallest are drawn: ranks and resuming make no difference.
    """
    candidates = np.flatnonzero(batch.host_mask.numpy())
    if len(candidates) > num_anchors:
        numbers = draw_numbers(batch, seed=seed, epoch=epoch, purpose="anchors/")
        chosen = np.argpartition(numbers[candidates], num_anchors - 1)[:num_anchors]
        candidates = np.sort(candidates[chosen])
    return replace(batch, anchors=torch.from_numpy(candidates))


def find_blocks(batch: Batch, num_predictions: int) -> Blocks:
    """Plan the blocks of a batch with anchors; enqueues two small copies to its device.

    Prediction s of an anchor is scored while all positions from the anchor to s further are
    supervised: past an answer, no token is drafted.
    """
    assert batch.anchors is not None, "anchors are drawn before"
    anchors, device = batch.anchors.numpy(), batch.input_ids.device
    if not len(anchors):
        anchors = np.zeros(1, dtype=np.int64)
    seq_len = len(batch.host_mask)
    bounds = document_bounds(batch.lengths, seq_len)
    scored = scored_on_host(batch, num_predictions)[:, anchors]
    is_scored = scored.int().cumprod(0).bool().numpy()  # [predictions, anchors]
    supervised = np.flatnonzero(batch.host_mask.numpy())
    first = np.searchsorted(supervised, anchors)
    # Supervised positions without a gap are consecutive targets.
    targets = np.where(is_scored, first + np.arange(num_predictions)[:, None], -1)
    return Blocks(
        anchors=move(torch.from_numpy(anchors), device),
        targets=move(torch.from_numpy(np.ascontiguousarray(targets.T)), device),
        target_bounds=(first, np.searchsorted(supervised, anchors + num_predictions)),
        spans=BlockSpans(
            anchor_bounds=tuple(np.searchsorted(anchors, bounds).tolist()),
            context_bounds=bounds,
            host_anchors=tuple(anchors.tolist()),
        ),
    )
