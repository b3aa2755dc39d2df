"""Eagle3Training: an EAGLE-3 draft and its training step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.draft_model import DraftModel, StepSums
from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.algorithms.objective import (
    COUNTERS,
    RATIOS,
    scored_positions,
    shifted,
    sum_steps,
)
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.kernels.device import make_generator, move
from speculators_cli.core.models.losses import Loss
from speculators_cli.core.models.verifier import FrozenVerifier

# Standard deviation of initial weights, as in Llama.
INIT_STD = 0.02


class Eagle3Training(Eagle3Draft, DraftModel):
    """An EAGLE-3 draft that is trained on the verifier's distributions.

    Args:
        config: Of the draft.
        verifier: Frozen embedding, final norm and LM head.
        vocab_map: Which verifier tokens the draft can propose.
        loss: Loss function per position.
        loss_decay: TTT step k is weighted by `loss_decay**k`.
        train_head: Whether the LM head is trained.
        use_fast_kernels: Whether to compute only rows that reach the loss, with GPU kernels.
    """

    config: Eagle3Config
    counters = COUNTERS
    ratios = RATIOS

    def __init__(
        self,
        config: Eagle3Config,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        *,
        loss: Loss,
        loss_decay: float,
        train_head: bool,
        use_fast_kernels: bool = False,
    ) -> None:
        super().__init__(config, verifier.embedding)
        self.use_fast_kernels = use_fast_kernels
        self.verifier = verifier
        self.vocab_map = vocab_map
        self.loss = loss
        self.loss_decay = loss_decay
        self.kept_ids = vocab_map.kept_ids.to(verifier.head.device)
        self.verifier_rows = verifier.head if vocab_map.is_full else verifier.head[self.kept_ids]
        self.lm_head.requires_grad_(train_head)

    def initialise(self, seed: int) -> None:
        """Initialize norm weights to one, others normally, lm_head from the verifier."""
        generator = make_generator(self.fc.weight.device, seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                elif parameter is not self.lm_head.weight:
                    parameter.normal_(std=INIT_STD, generator=generator)
            self.lm_head.weight.copy_(self.verifier_rows)

    def awaited_weights(self) -> Sequence[nn.Parameter]:
        """All matrices, with fast kernels."""
        return [p for p in self.parameters() if p.dim() == 2 and self.use_fast_kernels]

    def shared_weights(self) -> Sequence[nn.Parameter]:
        """All but those that a norm weight is multiplied into."""
        own = self.layers[0].get_submodule("self_attn")
        folded = {id(own.get_parameter(f"{name}_proj.weight")) for name in "qkv"}
        return [p for p in self.awaited_weights() if id(p) not in folded]

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each TTT step in the loss: powers of the decay."""
        return tuple(self.loss_decay**step for step in range(self.config.ttt_steps))

    def count_scored(self, batch: Batch) -> Tensor:
        """Positions each TTT step will score; [steps], int64."""
        return self._scored(batch).sum(-1)

    def _scored(self, batch: Batch) -> Tensor:
        depths = None if batch.depths is None else move(batch.depths, batch.loss_mask.device)
        return scored_positions(
            batch.loss_mask, batch.document_ids, self.config.ttt_steps, depths=depths
        )

    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Run the TTT steps, and score the tokens that they predict."""
        if self.use_fast_kernels:
            return self._unroll_fast(batch, weights)
        log_probs, tokens = map(batch.at_positions, self.targets(batch))
        read, hidden = batch.input_ids, self.fuse(batch.aux_hidden_states)
        memories = [TTTMemory(batch.lengths, window) for window in self.config.windows]
        losses, agreed = [], []
        for step in range(self.config.ttt_steps):
            if step > 0:
                read, hidden = self.next_inputs(shifted(batch.input_ids, step), hidden)
            normed, hidden = self.step(read, hidden, batch.position_ids + step, memories)
            logits = self.lm_head(normed)
            losses.append(self.loss.plain(logits, shifted(log_probs, step)))
            agreed.append(self.kept_ids[logits.detach().argmax(-1)] == shifted(tokens, step))
        return sum_steps(torch.stack(losses), torch.stack(agreed), self._scored(batch), weights)

    def _unroll_fast(self, batch: Batch, weights: Tensor | None) -> StepSums:
        # Triton is only available with a GPU.
        from speculators_cli.core.algorithms.eagle3.fast_step import unroll
        from speculators_cli.core.algorithms.fused_targets import find_targets

        if weights is None:
            weights = torch.ones(self.config.ttt_steps, device=self.fc.weight.device)
        targets = find_targets(
            batch,
            self.verifier,
            self.verifier_rows,
            self.kept_ids,
            over_whole_vocab=not self.training,
        )
        return unroll(self, batch, targets, weights)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The verifier's distribution over the draft vocabulary, and its tokens.

        While training, the verifier's token is its best within the draft vocabulary; in validation
        (`eval()`) its best of all, so that a token the draft cannot propose counts as a miss.

        Returns:
            Log-probabilities, [targets, draft_vocab], float32; verifier ids, [targets], int64.
        """
        normed = self.verifier.normed(batch.last_hidden_states, batch.is_normed)
        logits = self.verifier.logits(
            normed, self.verifier_rows, self.verifier.bias_of(self.kept_ids)
        )
        is_training = self.training
        tokens = self.kept_ids[logits.argmax(-1)] if is_training else self.verifier.tokens(normed)
        return logits.log_softmax(-1), tokens

    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """The verifier's embedding, and the vocabulary maps unless the vocabulary is full."""
        tensors = {"embed_tokens.weight": self.embedding}
        if not self.vocab_map.is_full:
            tensors |= {"d2t": self.vocab_map.d2t, "t2d": self.vocab_map.t2d}
        return tensors
