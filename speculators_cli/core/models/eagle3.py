"""The EAGLE-3 draft (arXiv 2503.01840), as vLLM runs it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.attention import AttentionMemory, TTTMemory
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.draft import DraftModel
from speculators_cli.core.models.draft_source import DraftSource
from speculators_cli.core.models.layers import (
    MLP,
    Attention,
    DecoderLayer,
    Linear,
    RMSNorm,
    RotaryEmbedding,
)
from speculators_cli.core.models.losses import Loss, kl_loss
from speculators_cli.core.models.ttt import StepSums, scored_positions, shifted, sum_steps
from speculators_cli.core.models.verifier import FrozenVerifier

# Standard deviation of fresh weights, as Llama's.
INIT_STD = 0.02


class FirstLayer(nn.Module):
    """The first decoder layer: reads the token's embedding beside the hidden states."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        embedded: Tensor,  # [seq_len, hidden]: embedding of each position's token
        hidden: Tensor,  # [seq_len, hidden]: what is known below each position's token
        rope: tuple[Tensor, Tensor],
        memory: AttentionMemory,
    ) -> Tensor:
        """One decoder layer; [seq_len, hidden], before any norm."""
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        residual = normed if self.norm_before_residual else hidden
        hidden = residual + self.self_attn(both, rope, memory)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Eagle3Draft(DraftModel):
    """An EAGLE-3 draft and its training step.

    Args:
        config: Shape and mathematics.
        verifier: Frozen embedding, final norm and head.
        vocab_map: Which verifier tokens the draft can propose.
        loss: Distance of each position, from `LOSSES`.
        loss_decay: Loss weight of a TTT step over the one before.
        train_head: Whether the lm_head is trained.
        use_fast_kernels: Whether a step computes only what reaches the loss, with kernels of a GPU.
    """

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
        super().__init__()
        assert loss is kl_loss or not use_fast_kernels, "the fast kernels know one loss"
        self.use_fast_kernels = use_fast_kernels
        self.config = config
        self.verifier = verifier
        self.vocab_map = vocab_map
        self.loss = loss
        self.loss_decay = loss_decay
        kept_ids = vocab_map.kept_ids.to(verifier.head.device)
        self.kept_ids = kept_ids
        self.verifier_rows = verifier.head[kept_ids] if not vocab_map.is_full else verifier.head

        size, eps = config.hidden_size, config.rms_norm_eps
        num_aux, target_size = config.num_aux_layers, config.target_hidden_size
        self.input_norm = RMSNorm(num_aux * target_size, eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(RMSNorm(target_size, eps) for _ in range(num_aux))
            if config.fc_norm
            else None
        )
        self.fc = Linear(num_aux * target_size, size)
        self.layers = nn.ModuleList(
            [FirstLayer(config), *(DecoderLayer(config) for _ in range(config.num_layers - 1))]
        )
        self.norm = RMSNorm(size, eps)
        self.lm_head = Linear(size, config.draft_vocab_size).requires_grad_(train_head)
        self.rotary = RotaryEmbedding(config)

    def initialise(self, seed: int) -> None:
        """Fill the weights: gains one, matrices normal, lm_head the verifier's rows."""
        generator = torch.Generator(self.fc.weight.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                elif parameter is not self.lm_head.weight:
                    parameter.normal_(std=INIT_STD, generator=generator)
            self.lm_head.weight.copy_(self.verifier_rows)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each TTT step in the loss: powers of the decay."""
        return tuple(self.loss_decay**step for step in range(self.config.ttt_steps))

    def count_scored(self, batch: Batch) -> Tensor:
        """Positions each TTT step will score; [steps], int64."""
        return self._scored(batch).sum(-1)

    def _scored(self, batch: Batch) -> Tensor:
        return scored_positions(batch.loss_mask, batch.document_ids, self.config.ttt_steps)

    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Unroll the draft on its own hidden states, with the true tokens as input."""
        if self.use_fast_kernels:
            # Triton is there where a GPU is.
            from speculators_cli.core.models.fast.unroll import unroll

            if weights is None:
                weights = torch.ones(self.config.ttt_steps, device=self.fc.weight.device)
            return unroll(self, batch, weights)
        log_probs, tokens = map(batch.at_positions, self.targets(batch))
        hidden = self.fuse(batch.aux_hidden_states)
        memories = [TTTMemory(batch.lengths) for _ in self.layers]
        losses, agreed = [], []
        for step in range(self.config.ttt_steps):
            embedded = self.embed(shifted(batch.input_ids, step), hidden.dtype)
            hidden = self.decode(embedded, hidden, batch.position_ids + step, memories)
            normed = self.norm(hidden)
            logits = self.lm_head(normed)
            losses.append(self.loss(logits, shifted(log_probs, step)))
            agreed.append(self.kept_ids[logits.detach().argmax(-1)] == shifted(tokens, step))
            hidden = normed if self.config.norm_output else hidden
        return sum_steps(torch.stack(losses), torch.stack(agreed), self._scored(batch), weights)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The verifier's distribution over the draft vocabulary, and its tokens.

        While training, the verifier's token is its best within the draft vocabulary; in validation
        (`eval()`) its best of all, so that a token the draft cannot propose counts as a miss.

        Returns:
            Log-probabilities, [targets, draft_vocab], float32; verifier ids, [targets], int64.
        """
        normed = self.verifier.normed(batch.last_hidden_states, batch.is_normed)
        logits = self.verifier.logits(normed, self.verifier_rows)
        is_training = self.training
        tokens = self.kept_ids[logits.argmax(-1)] if is_training else self.verifier.tokens(normed)
        return logits.log_softmax(-1), tokens

    def fuse(
        self,
        aux_hidden_states: Tensor,  # [seq_len, aux*hidden]
    ) -> Tensor:
        """Bring the verifier's aux hidden states to the draft's width; [seq_len, hidden]."""
        fused: Tensor = self.fc(self.normed_aux(aux_hidden_states))
        return fused

    def normed_aux(
        self,
        aux_hidden_states: Tensor,  # [seq_len, aux*hidden]
    ) -> Tensor:
        """Aux hidden states after the norms before `fc`, if there are any."""
        if self.input_norm is not None:
            aux_hidden_states = self.input_norm(aux_hidden_states)
        if self.fc_norm is not None:
            parts = aux_hidden_states.chunk(self.config.num_aux_layers, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            aux_hidden_states = torch.cat(normed, dim=-1)
        return aux_hidden_states

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The verifier's embedding of verifier ids [seq_len]; [seq_len, hidden]."""
        return self.verifier.embedding[tokens].to(dtype)

    def decode(
        self,
        embedded: Tensor,  # [seq_len, hidden]
        hidden: Tensor,  # [seq_len, hidden]
        position_ids: Tensor,  # [seq_len], int64
        memories: list[AttentionMemory] | list[TTTMemory],
    ) -> Tensor:
        """Run all decoder layers once; [seq_len, hidden], before the final norm."""
        rope = self.rotary(position_ids)
        hidden = self.layers[0](embedded, hidden, rope, memories[0])
        for layer, memory in zip(self.layers[1:], memories[1:], strict=True):
            hidden = layer(hidden, rope, memory)
        return hidden

    def checkpoint_config(self) -> dict[str, Any]:
        """Contents of the checkpoint's config.json."""
        return self.config.to_json()

    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """The verifier's embedding, and the vocabulary maps unless the vocabulary is full."""
        tensors = {"embed_tokens.weight": self.verifier.embedding}
        if not self.vocab_map.is_full:
            tensors |= {"d2t": self.vocab_map.d2t, "t2d": self.vocab_map.t2d}
        return tensors


def load_draft(source: DraftSource, verifier: FrozenVerifier) -> Eagle3Draft:
    """A trained draft on the device of the verifier's parts, in float32."""
    with verifier.embedding.device:
        draft = Eagle3Draft(
            source.config,
            verifier,
            source.vocab_map,
            loss=kl_loss,
            loss_decay=1.0,
            train_head=False,
        )
    draft.load_state_dict(dict(source.weights))
    return draft.eval()
