"""DFlashTraining: a DFlash draft and its training step."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speculators_cli.core.algorithms.dflash.blocks import Blocks, draw_anchors, find_blocks
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.draft import DFlashDraft
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights, weigh_by_acceptance
from speculators_cli.core.algorithms.draft_model import DraftModel, Ratio, StepSums
from speculators_cli.core.algorithms.objective import (
    COUNTERS,
    RATIOS,
    sum_steps,
    weigh_as_one_mean,
)
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.kernels.device import make_generator
from speculators_cli.core.models.losses import Loss
from speculators_cli.core.models.verifier import FrozenVerifier

# Standard deviation of initial weights, as in Qwen3.
INIT_STD = 0.02
MAX_LOGITS = 2**27  # of the draft that are computed at once, without fused kernels


class DFlashTraining(DFlashDraft, DraftModel):
    """A DFlash draft that is trained on the verifier's distributions.

    Args:
        config: Of the draft.
        verifier: Frozen embedding, final norm and LM head.
        vocab_map: Which verifier tokens the draft can propose.
        loss: Loss function per prediction.
        weights: What the predictions of a block weigh in the loss.
        num_anchors: Blocks per packed sequence, at most.
        use_fast_kernels: Whether to compute with GPU kernels.

    Raises:
        SettingsError: The draft would use an LM head with a bias.
    """

    config: DFlashConfig
    counters: ClassVar[tuple[str, ...]] = COUNTERS
    ratios: ClassVar[tuple[Ratio, ...]] = RATIOS

    def __init__(
        self,
        config: DFlashConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        *,
        loss: Loss,
        weights: LossWeights,
        num_anchors: int,
        use_fast_kernels: bool = False,
    ) -> None:
        if not config.owns_head and verifier.head_bias is not None:
            raise SettingsError(
                f"The LM head of verifier `{config.verifier_name_or_path}` has a bias, which "
                "engines and training would apply to the draft differently",
                hint="Train with a draft vocabulary, without `--full-vocab`",
            )
        super().__init__(config, verifier.embedding, None if config.owns_head else verifier.head)
        self.use_fast_kernels = use_fast_kernels
        self.verifier = verifier
        self.vocab_map = vocab_map
        self.loss = loss
        self.weights = weights
        self.num_anchors = num_anchors
        self.kept_ids = vocab_map.kept_ids.to(verifier.head.device)
        self.verifier_rows = verifier.head if vocab_map.is_full else verifier.head[self.kept_ids]

    def initialise(self, seed: int) -> None:
        """Initialize norm weights to one, matrices normally, lm_head from the verifier."""
        generator = make_generator(self.fc.weight.device, seed)
        own_head = None if self.lm_head is None else self.lm_head.weight
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                elif parameter is not own_head:
                    parameter.normal_(std=INIT_STD, generator=generator)
            if own_head is not None:
                own_head.copy_(self.verifier_rows)

    def awaited_weights(self) -> Sequence[nn.Parameter]:
        """Matrices of `fc`, the layers and the LM head, with fast kernels."""
        if not self.use_fast_kernels or self.lm_head is None:
            return self.once_run_weights()
        return [*self.once_run_weights(), *self.lm_head.parameters()]

    def once_run_weights(self) -> Sequence[nn.Parameter]:
        """Matrices of `fc` and the layers, with fast kernels; the loss sums over its chunks."""
        if not self.use_fast_kernels:
            return ()
        return [p for module in (self.fc, *self.layers) for p in module.parameters() if p.dim() > 1]

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each prediction of a block; where it depends on the block, one."""
        return self.weights.of_predictions(self.config.num_draft_tokens)

    def draw(self, batch: Batch, *, seed: int, epoch: int) -> Batch:
        """The batch with its anchors."""
        return draw_anchors(batch, self.num_anchors, seed=seed, epoch=epoch)

    def normalise(self, loss_weights: Tensor, num_scored: Tensor) -> Tensor:
        """What a scored prediction weighs: the loss is one weighted mean over all of them."""
        return weigh_as_one_mean(loss_weights, num_scored)

    def count_scored(self, batch: Batch) -> Tensor:
        """Anchors at which each prediction will be scored; [predictions], int64."""
        return self._scored(batch, find_blocks(batch, self.config.num_draft_tokens)).sum(0)

    def _scored(self, batch: Batch, blocks: Blocks) -> Tensor:
        """Where predictions are scored; [anchors, predictions], bool."""
        # A document with broken hidden states keeps its targets, and loses its mask.
        return (blocks.targets >= 0) & batch.loss_mask[blocks.anchors, None]

    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Fill in the blocks of all anchors at once, and score their tokens."""
        blocks = find_blocks(batch, self.config.num_draft_tokens)
        if self.use_fast_kernels:
            # Triton is only available with a GPU.
            from speculators_cli.core.algorithms.dflash import fast_step

            return self.score_fast(batch, blocks, fast_step.predict(self, batch, blocks), weights)
        parts = self._score_in_chunks(batch, blocks, self.predict(batch, blocks))
        return self.sum_parts(parts, self._scored(batch, blocks), weights)

    def score_fast(
        self,
        batch: Batch,
        blocks: Blocks,
        normed: Tensor,  # [anchors, predictions, hidden]
        weights: Tensor | None,  # [predictions]
    ) -> StepSums:
        """Score all blocks with fused kernels."""
        from speculators_cli.core.algorithms.dflash import fused_loss
        from speculators_cli.core.kernels.linear_loss import Mix

        scores = fused_loss.score(
            batch,
            blocks,
            [(normed, self.head)],
            self.verifier,
            self.verifier_rows,
            self.kept_ids,
            mix=Mix(**{self.loss.name: 1.0}),
            weigh=fused_loss.choose_weights(self.weights, weights),
            over_whole_vocab=not self.training,
            in_float8=self.multiplies_in_float8,
        )
        return fused_loss.sum_scores(scores)

    def _score_in_chunks(self, batch: Batch, blocks: Blocks, normed: Tensor) -> list[Tensor]:
        """Score some anchors at a time; where there are several chunks, logits are not kept."""
        num_anchors, num_predictions, _ = normed.shape
        size = max(MAX_LOGITS // (num_predictions * self.config.draft_vocab_size), 1)
        if num_anchors <= size:
            return list(self.score_anchors(batch, blocks, normed, 0, num_anchors))
        chunks = [
            checkpoint(
                self.score_anchors,
                batch,
                blocks,
                normed[start : start + size],
                start,
                min(start + size, num_anchors),
                use_reentrant=False,
            )
            for start in range(0, num_anchors, size)
        ]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def score_anchors(
        self,
        batch: Batch,
        blocks: Blocks,
        normed: Tensor,  # [some, predictions, hidden]: of the anchors from `start` to `stop`
        start: int,
        stop: int,
    ) -> tuple[Tensor, ...]:
        """Losses of predictions, whether the verifier agrees, and what a subclass adds.

        Returns:
            Each [some, predictions]; any value where nothing is scored.
        """
        log_probs, tokens = self.targets_of(batch, blocks, start, stop)
        logits = self.logits(normed)
        agreed = self.kept_ids[logits.detach().argmax(-1)] == tokens
        return self.loss.plain(logits, log_probs), agreed

    def sum_parts(
        self,
        parts: Sequence[Tensor],  # of `score_anchors`, for all anchors
        scored: Tensor,  # [anchors, predictions], bool
        weights: Tensor | None,
    ) -> StepSums:
        """Sum over the anchors."""
        losses, agreed = parts[0].masked_fill(~scored, 0.0), parts[1]
        sums = sum_steps(losses.T, agreed.T, scored.T, weights)
        if self.weights.alpha is None:
            return sums
        own = weigh_by_acceptance(losses.detach(), scored, self.weights.alpha)
        return sums._replace(loss=(losses * own * (1.0 if weights is None else weights)).sum())

    def predict(self, batch: Batch, blocks: Blocks) -> Tensor:
        """What the LM head reads for each prediction; [anchors, predictions, hidden]."""
        # Row r has the states of token r, and the position of token r + 1.
        context = self.read_context(batch.aux_hidden_states, batch.position_ids - 1)
        normed = self.fill_in(
            batch.input_ids[blocks.anchors],
            batch.position_ids[blocks.anchors],
            context,
            blocks.spans,
            blocks.anchors,
        )
        return normed[:, self.config.first_slot :]

    @torch.no_grad()
    def targets_of(
        self, batch: Batch, blocks: Blocks, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """The verifier's distribution and token for each prediction of some anchors.

        While training, the verifier's token is its best within the draft vocabulary; in validation
        (`eval()`) its best of all, so that a token the draft cannot propose counts as a miss.

        Returns:
            Log-probabilities, [some, predictions, draft_vocab], float32; verifier ids, [some,
            predictions], int64; any value where nothing is scored.
        """
        first, last = blocks.targets_of(start, stop)
        here = slice(first, max(last, first))
        normed = self.verifier.normed(batch.last_hidden_states[here], batch.is_normed[here])
        # One more, for what is not scored.
        normed = torch.cat((normed, normed.new_zeros(1, normed.shape[1])))
        logits = self.verifier.logits(
            normed, self.verifier_rows, self.verifier.bias_of(self.kept_ids)
        )
        is_training = self.training
        tokens = self.kept_ids[logits.argmax(-1)] if is_training else self.verifier.tokens(normed)
        indices = blocks.targets[start:stop]
        indices = (indices - first).where(indices >= 0, len(normed) - 1)
        return logits.log_softmax(-1)[indices], tokens[indices]

    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """The verifier's embedding, and the vocabulary maps unless the vocabulary is full."""
        tensors = {"embed_tokens.weight": self.embedding}
        if not self.vocab_map.is_full:
            tensors |= {"d2t": self.vocab_map.d2t, "t2d": self.vocab_map.t2d}
        return tensors
