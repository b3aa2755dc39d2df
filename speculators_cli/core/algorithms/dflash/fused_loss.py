"""The loss of blocks fused with the LM head: the same function as the plain one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.blocks import Blocks
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights, weigh_by_acceptance
from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.algorithms.fused_targets import find_targets
from speculators_cli.core.algorithms.objective import sum_steps
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.linear_loss import BlockScores, Mix, Weigh, linear_loss
from speculators_cli.core.kernels.shared import SharedWeight
from speculators_cli.core.models.verifier import FrozenVerifier


def score(
    batch: Batch,
    blocks: Blocks,
    products: Sequence[tuple[Tensor, Tensor]],  # [anchors, predictions, in]; [draft_vocab, in]
    verifier: FrozenVerifier,
    verifier_rows: Tensor,  # [draft_vocab, hidden]
    kept_ids: Tensor,  # [draft_vocab], int64
    *,
    mix: Mix,
    weigh: Weigh,
    over_whole_vocab: bool,
    in_float8: bool,
) -> BlockScores:
    """Score all predictions of all blocks, with the sum of some products as their logits.

    No logits outlive their chunk.
    """
    dtype = products[0][0].dtype
    return linear_loss(
        [(x, SharedWeight([weight], dtype, in_float8=in_float8)) for x, weight in products],
        blocks.targets,
        blocks.targets_of,
        weigh,
        mix,
        find_targets(batch, verifier, verifier_rows, kept_ids, over_whole_vocab=over_whole_vocab),
    )


def choose_weights(
    settings: LossWeights,
    weights: Tensor | None,  # [predictions]; None: one each
) -> Weigh:
    """What each prediction weighs in the loss."""

    def weigh(losses: Tensor, scored: Tensor) -> Tensor:
        own = torch.ones_like(losses) if weights is None else weights[None]
        if settings.alpha is None:
            return own
        return own * weigh_by_acceptance(losses, scored, settings.alpha)

    return weigh


def sum_scores(scores: BlockScores) -> StepSums:
    """Sum over the anchors."""
    sums = sum_steps(scores.losses.T, scores.agreed.T, scores.scored.T)
    return sums._replace(loss=scores.loss)
