"""The DFlash draft (arXiv 2602.06036), as vLLM runs it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.attention import (
    BlockMemory,
    BlockShape,
    BlockSpans,
    find_groups,
)
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.models.layers import (
    Attention,
    DecoderLayer,
    Linear,
    RMSNorm,
    RotaryEmbedding,
)

Context = Sequence[tuple[Tensor, Tensor]]  # of each layer: keys, values [rows, kv_heads, head_dim]


class DFlashDraft(nn.Module):
    """A DFlash draft: every layer attends to the verifier's hidden states, and within a block.

    Args:
        config: Of the draft.
        embedding: The verifier's, [vocab, hidden]; frozen, and not a parameter of the draft.
        head: The verifier's, [vocab, hidden], for a draft without its own; frozen.
    """

    config: DFlashConfig

    def __init__(self, config: DFlashConfig, embedding: Tensor, head: Tensor | None) -> None:
        super().__init__()
        assert config.owns_head or head is not None, "with the full vocabulary, it has no LM head"
        self.config = config
        self.embedding = embedding
        self.verifier_head = head
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = Linear(config.num_aux_layers * config.target_hidden_size, size)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, eps)
        self.lm_head = Linear(size, config.draft_vocab_size) if config.owns_head else None
        self.rotary = RotaryEmbedding(config)

    @property
    def head(self) -> Tensor:
        """Weights of the LM head: its own, or the verifier's; [draft_vocab, hidden]."""
        if self.lm_head is not None:
            return self.lm_head.weight
        assert self.verifier_head is not None
        return self.verifier_head

    @property
    def block_shape(self) -> BlockShape:
        """Which positions the tokens of a block see."""
        config = self.config
        return BlockShape(config.block_size, config.draft_window, config.causal_block)

    def read_context(
        self,
        aux_hidden_states: Tensor,  # [rows, aux*hidden]
        position_ids: Tensor,  # [rows], int64: of the tokens whose states these are, from 0
    ) -> Context:
        """Keys and values of each layer; a layer's input norm is not applied to the context."""
        fused = self.hidden_norm(self.fc(aux_hidden_states))
        rope = self.rotary(position_ids)
        attentions: list[Attention] = [layer.self_attn for layer in self.layers]  # type: ignore[misc]
        return [attention.keys_and_values(fused, rope) for attention in attentions]

    def fill_in(
        self,
        tokens: Tensor,  # [anchors], int64: verifier ids of the anchors
        position_ids: Tensor,  # [anchors], int64: of the anchors, from 0
        context: Context,
        spans: BlockSpans,
        anchors: Tensor,  # [anchors], int64: the last row of the context of each
    ) -> Tensor:
        """What the LM head reads at every token of every block; [anchors, block, hidden]."""
        shape, dtype = self.block_shape, context[0][0].dtype
        hidden = self.embed_blocks(tokens).to(dtype)
        places = torch.arange(shape.size, device=tokens.device)
        rope = self.rotary((position_ids[:, None] + places).flatten())
        groups = find_groups(shape, spans, anchors)
        for layer, (key, value) in zip(self.layers, context, strict=True):
            hidden = layer(hidden, rope, BlockMemory(groups, key, value))
        normed: Tensor = self.norm(hidden)
        return normed.view(len(tokens), shape.size, -1)

    def embed_blocks(
        self,
        tokens: Tensor,  # [anchors], int64: verifier ids of the anchors
    ) -> Tensor:
        """The tokens of blocks that are known, the anchors, and masks; [anchors*block, hidden]."""
        mask = self.embedding[self.config.mask_token_id]
        masks = mask.expand(len(tokens), self.config.block_size - 1, -1)
        return torch.cat((self.embedding[tokens][:, None], masks), dim=1).flatten(0, 1)

    def logits(
        self,
        normed: Tensor,  # [..., hidden]
    ) -> Tensor:
        """Logits of the draft vocabulary; [..., draft_vocab]."""
        logits: Tensor = F.linear(normed, self.head.to(normed.dtype))
        return logits
