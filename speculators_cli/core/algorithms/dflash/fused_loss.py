"""The loss of blocks fused with the LM head: the same function as the plain one."""

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.blocks import Blocks
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.algorithms.fused_targets import find_targets
from speculators_cli.core.algorithms.objective import sum_steps
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.linear_kl import linear_kl
from speculators_cli.core.kernels.shared import SharedWeight


def score(
    draft: DFlashTraining,
    batch: Batch,
    blocks: Blocks,
    normed: Tensor,  # [anchors, predictions, hidden]
    weights: Tensor | None,  # [predictions]
) -> StepSums:
    """Score all predictions of all blocks; no logits outlive their chunk."""
    if weights is None:
        weights = torch.ones(normed.shape[1], device=normed.device)
    targets = find_targets(
        batch,
        draft.verifier,
        draft.verifier_rows,
        draft.kept_ids,
        over_whole_vocab=not draft.training,
    )
    scores = linear_kl(
        normed.detach().contiguous(),
        normed.unbind(1),
        SharedWeight([draft.head], normed.dtype),
        blocks.targets,
        blocks.targets_of,
        weights,
        targets,
    )
    sums = sum_steps(scores.losses.T, scores.agreed.T, scores.scored.T)
    return sums._replace(loss=scores.loss)
