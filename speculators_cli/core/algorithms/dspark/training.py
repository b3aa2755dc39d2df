"""DSparkTraining: a DSpark draft and its training step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.algorithms.dflash.blocks import Blocks
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.algorithms.draft_model import Ratio, StepSums
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.heads import ConfidenceHead
from speculators_cli.core.algorithms.dspark.markov import MARKOV_HEADS
from speculators_cli.core.algorithms.objective import COUNTERS, RATIOS
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.losses import LOSSES, ce_loss, tv_loss
from speculators_cli.core.models.verifier import FrozenVerifier


@dataclass(frozen=True)
class LossParts:
    """Weights of the parts of the loss of a prediction."""

    ce: float  # cross-entropy with the verifier's token
    l1: float  # distance from the verifier's distribution
    confidence: float  # binary cross-entropy of the confidence


class DSparkTraining(DFlashTraining):
    """A DSpark draft that is trained on the verifier's distributions, with the true tokens before.

    Args:
        config: Of the draft.
        verifier: Frozen embedding, final norm and LM head.
        vocab_map: Which verifier tokens the draft can propose.
        parts: Of the loss.
        weights: What the predictions of a block weigh in the loss.
        num_anchors: Blocks per packed sequence, at most.
        use_fast_kernels: Whether to compute with GPU kernels.
    """

    config: DSparkConfig
    counters = (*COUNTERS, "confidence_losses")
    ratios = (*RATIOS, Ratio("confidence_loss", "confidence_losses", "num_scored"))

    def __init__(
        self,
        config: DSparkConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        *,
        parts: LossParts,
        weights: LossWeights,
        num_anchors: int,
        use_fast_kernels: bool = False,
    ) -> None:
        super().__init__(
            config,
            verifier,
            vocab_map,
            loss=LOSSES["ce"],
            weights=weights,
            num_anchors=num_anchors,
            use_fast_kernels=use_fast_kernels,
        )
        self.parts = parts
        self.markov_head = MARKOV_HEADS[config.markov_head_type](config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None

    def initialise(self, seed: int) -> None:
        """Initialize as DFlash does, and biases to zero."""
        super().initialise(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()

    def score_anchors(
        self,
        batch: Batch,
        blocks: Blocks,
        normed: Tensor,  # [some, predictions, hidden]: of the anchors from `start` to `stop`
        start: int,
        stop: int,
    ) -> tuple[Tensor, ...]:
        """Losses of predictions, whether the verifier agrees, and losses of the confidence."""
        log_probs, tokens = self.targets_of(batch, blocks, start, stop)
        before = self.tokens_before(batch, blocks)[start:stop]
        embedded = self.markov_head.embed(before, normed.dtype)
        logits = self.logits(normed) + self.markov_head(self.markov_head.steps(embedded, normed))
        distances = tv_loss(logits, log_probs)
        losses = self.parts.ce * ce_loss(logits, log_probs) + self.parts.l1 * 2 * distances
        confidence = self.score_confidence(normed, embedded, distances)
        losses = losses + self.parts.confidence * confidence
        agreed = self.kept_ids[logits.detach().argmax(-1)] == tokens
        return losses, agreed, confidence.detach()

    def score_fast(
        self,
        batch: Batch,
        blocks: Blocks,
        normed: Tensor,  # [anchors, predictions, hidden]
        weights: Tensor | None,  # [predictions]
    ) -> StepSums:
        """Score all blocks with fused kernels, and their confidence with plain ones."""
        from speculators_cli.core.algorithms.dflash import fused_loss
        from speculators_cli.core.kernels.linear_loss import Mix

        embedded = self.markov_head.embed(self.tokens_before(batch, blocks), normed.dtype)
        scores = fused_loss.score(
            batch,
            blocks,
            [
                (normed, self.head),
                (self.markov_head.steps(embedded, normed), self.markov_head.markov_w2.weight),
            ],
            self.verifier,
            self.verifier_rows,
            self.kept_ids,
            mix=Mix(ce=self.parts.ce, tv=2 * self.parts.l1),
            weigh=fused_loss.choose_weights(self.weights, weights),
            over_whole_vocab=not self.training,
            in_float8=self.multiplies_in_float8,
        )
        confidence = self.score_confidence(normed, embedded, scores.distances)
        confidence = confidence.masked_fill(~scores.scored, 0.0)
        weighted = confidence if weights is None else confidence * weights
        own = self.parts.confidence
        sums = fused_loss.sum_scores(
            scores._replace(
                loss=scores.loss + own * weighted.sum(),
                losses=scores.losses + own * confidence.detach(),
            )
        )
        return self.with_confidence(sums, confidence)

    def score_confidence(
        self,
        normed: Tensor,  # [..., hidden]
        embedded: Tensor,  # [..., rank]
        distances: Tensor,  # [...]: total variation
    ) -> Tensor:
        """Binary cross-entropy with the probability that sampling accepts a token; [...]."""
        if self.confidence_head is None:
            return torch.zeros_like(distances)
        return F.binary_cross_entropy_with_logits(
            self.confidence_head(normed, embedded), 1.0 - distances.detach(), reduction="none"
        )

    def with_confidence(
        self,
        sums: StepSums,
        confidence: Tensor,  # [anchors, predictions], 0 where nothing is scored
    ) -> StepSums:
        """Add the counter of the confidence."""
        counters = sums.counters | {"confidence_losses": confidence.detach().sum(0)}
        return sums._replace(counters=counters)

    def sum_parts(
        self,
        parts: Sequence[Tensor],  # of `score_anchors`, for all anchors
        scored: Tensor,  # [anchors, predictions], bool
        weights: Tensor | None,
    ) -> StepSums:
        """Sum over the anchors."""
        sums = super().sum_parts(parts, scored, weights)
        return self.with_confidence(sums, parts[2].masked_fill(~scored, 0.0))

    def tokens_before(self, batch: Batch, blocks: Blocks) -> Tensor:
        """The token before each prediction, as the sample has it; [anchors, predictions]."""
        places = torch.arange(self.config.num_draft_tokens, device=blocks.anchors.device)
        rows = blocks.anchors[:, None] + places
        # Past the end, nothing is scored.
        return batch.input_ids[rows.clamp(max=len(batch.input_ids) - 1)]
