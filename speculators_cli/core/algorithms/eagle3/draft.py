"""The EAGLE-3 draft (arXiv 2503.01840), as vLLM runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.models.attention import AttentionMemory
from speculators_cli.core.models.layers import (
    MLP,
    Attention,
    DecoderLayer,
    Linear,
    RMSNorm,
    RotaryEmbedding,
)


class FirstLayer(nn.Module):
    """The first decoder layer: reads the token's embedding and the hidden states."""

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
        hidden: Tensor,  # [seq_len, hidden]: hidden states of the token before each position's
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


class Eagle3Draft(nn.Module):
    """An EAGLE-3 draft.

    Args:
        config: Of the draft.
        embedding: The verifier's, [vocab, hidden]; frozen, and not a parameter of the draft.
    """

    config: Eagle3Config

    def __init__(self, config: Eagle3Config, embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
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
        self.lm_head = Linear(size, config.draft_vocab_size)
        self.rotary = RotaryEmbedding(config)

    def fuse(
        self,
        aux_hidden_states: Tensor,  # [seq_len, aux*hidden]
    ) -> Tensor:
        """Project aux hidden states to the draft's hidden size; [seq_len, hidden]."""
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

    def step(
        self,
        tokens: Tensor,  # [seq_len], int64: verifier ids
        hidden: Tensor,  # [seq_len, hidden]
        position_ids: Tensor,  # [seq_len], int64
        memories: Sequence[AttentionMemory],
    ) -> tuple[Tensor, Tensor]:
        """Run all decoder layers once.

        Returns:
            The input of `lm_head`, and the hidden states of the next step; each [seq_len, hidden].
        """
        embedded, rope = self.embed(tokens, hidden.dtype), self.rotary(position_ids)
        hidden = self.layers[0](embedded, hidden, rope, memories[0])
        for layer, memory in zip(self.layers[1:], memories[1:], strict=True):
            hidden = layer(hidden, rope, memory)
        normed = self.norm(hidden)
        return normed, self.choose_fed_back(hidden, normed)

    def next_inputs(
        self,
        tokens: Tensor,  # [seq_len], int64: the true tokens of the next TTT step
        fed_back: Tensor,  # [seq_len, hidden]: of this one
    ) -> tuple[Tensor, Tensor]:
        """The tokens and hidden states that the next TTT step reads."""
        return tokens, fed_back

    def embed_mask(
        self,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor] | None:
        """What every TTT step after the first reads, if it is the same at all positions.

        Returns:
            The embedding, [1, hidden], and the aux hidden states, [1, aux*hidden].
        """
        return None

    def choose_fed_back(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """The hidden states that the next step reads: before the final norm, or after it."""
        return normed if self.config.norm_output else hidden

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The verifier's embedding of verifier ids [seq_len]; [seq_len, hidden]."""
        return self.embedding[tokens].to(dtype)
