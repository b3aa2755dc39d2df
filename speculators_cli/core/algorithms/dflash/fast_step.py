"""The blocks of a step with GPU kernels: the same function as the plain forward.

Weights are cast to the compute dtype once, and gradients are accumulated in float32. The keys and
values of the context are one product for all layers.
"""

import numpy as np
import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.blocks import Blocks
from speculators_cli.core.algorithms.dflash.draft import Context, DFlashDraft
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.anchor_spans import AnchorSpans
from speculators_cli.core.kernels.block_attention import block_attention
from speculators_cli.core.kernels.head_norm import norm_and_rotate
from speculators_cli.core.kernels.rms_norm import rms_norm
from speculators_cli.core.kernels.shared import SharedWeight
from speculators_cli.core.kernels.swiglu import swiglu
from speculators_cli.core.models.layers import Attention, DecoderLayer, RMSNorm

Rope = tuple[Tensor, Tensor]


def predict(draft: DFlashDraft, batch: Batch, blocks: Blocks) -> Tensor:
    """What the LM head reads for each prediction; [anchors, predictions, hidden]."""
    config, dtype, device = draft.config, batch.aux_hidden_states.dtype, batch.input_ids.device
    longest = max(batch.lengths, default=0) + config.block_size + 1
    rope = draft.rotary(torch.arange(longest, device=device))
    layers: list[DecoderLayer] = list(draft.layers)  # type: ignore[arg-type]
    context = _read_context(draft, layers, batch, rope)
    places = torch.arange(config.block_size, device=device)
    anchors = blocks.anchors
    positions = (batch.position_ids[anchors, None] + places).flatten()
    tokens = batch.input_ids[anchors]
    projected = _project_embeddings(draft, layers[0], tokens, dtype)
    residual = draft.embed_blocks(tokens).to(dtype)
    spans = _find_spans(draft, blocks, device)
    for index, (layer, own_context) in enumerate(zip(layers, context, strict=True), 1):
        hidden, residual = _run_layer(
            layer, projected, residual, rope, positions, own_context, spans
        )
        if index < len(layers):
            normed, residual = _norm(layers[index].input_layernorm, hidden, residual)
            projected = _query_key_value(layers[index], dtype).linear(normed)
    normed, _ = _norm(draft.norm, hidden, residual)
    return normed.view(len(anchors), config.block_size, -1)[:, config.first_slot :]


def _project_embeddings(
    draft: DFlashDraft,
    first: DecoderLayer,
    tokens: Tensor,  # [anchors], int64: verifier ids
    dtype: torch.dtype,
) -> Tensor:
    """Queries, keys and values of the first layer, where all masks have the same; [rows, out]."""
    mask = draft.embedding[draft.config.mask_token_id]
    embedded = torch.cat((draft.embedding[tokens], mask[None])).to(dtype)
    normed, _ = _norm(first.input_layernorm, embedded)
    projected = _query_key_value(first, dtype).linear(normed)
    masks = projected[-1].expand(len(tokens), draft.config.block_size - 1, -1)
    return torch.cat((projected[:-1, None], masks), dim=1).flatten(0, 1)


def _query_key_value(layer: DecoderLayer, dtype: torch.dtype) -> SharedWeight:
    own = layer.self_attn
    return SharedWeight([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight], dtype)


def _find_spans(draft: DFlashDraft, blocks: Blocks, device: torch.device) -> AnchorSpans:
    """What the blocks see, the same in every layer."""
    shape, spans = draft.block_shape, blocks.spans
    return AnchorSpans.of_anchors(
        np.repeat(spans.context_bounds[:-1], np.diff(spans.anchor_bounds)),
        np.array(spans.host_anchors),
        spans.context_bounds[-1],
        device,
        size=shape.size,
        window=shape.window,
        is_causal=shape.is_causal,
    )


def _norm(norm: RMSNorm, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + add` normalised, and `x + add` to go on with."""
    return rms_norm(x, norm.weight, norm.eps, add=add)


def _read_context(
    draft: DFlashDraft, layers: list[DecoderLayer], batch: Batch, rope: Rope
) -> Context:
    """Keys and values of the context in each layer."""
    dtype = batch.aux_hidden_states.dtype
    fused = SharedWeight([draft.fc.weight], dtype).linear(batch.aux_hidden_states)
    normed, _ = _norm(draft.hidden_norm, fused)
    attentions = [layer.self_attn for layer in layers]
    weights = [part.weight for own in attentions for part in (own.k_proj, own.v_proj)]
    projected = SharedWeight(weights, dtype).linear(normed).chunk(len(weights), dim=1)
    # Padding, which no anchor reads, is at position 0.
    positions = (batch.position_ids - 1).clamp(min=0)
    return [
        (_turn(own, own.k_norm, key, rope, positions), _by_head(own, value))
        for own, key, value in zip(attentions, projected[::2], projected[1::2], strict=True)
    ]


def _run_layer(
    layer: DecoderLayer,
    projected: Tensor,  # [rows, out]: queries, keys and values
    residual: Tensor,  # [rows, hidden]: what the attention's result is to be added to
    rope: Rope,
    positions: Tensor,  # [rows], int64
    context: tuple[Tensor, Tensor],  # of this layer
    spans: AnchorSpans,
) -> tuple[Tensor, Tensor]:
    """One layer over all rows; hidden states, and what is to be added to them."""
    own, mlp, dtype = layer.self_attn, layer.mlp, projected.dtype
    parts = (own.q_proj, own.k_proj, own.v_proj)
    query, key, value = projected.split([len(part.weight) for part in parts], dim=1)
    attended = block_attention(
        _turn(own, own.q_norm, query, rope, positions),
        *context,
        _turn(own, own.k_norm, key, rope, positions),
        _by_head(own, value),
        spans,
    )
    hidden = SharedWeight([own.o_proj.weight], dtype).linear(attended.flatten(1))
    normed, residual = _norm(layer.post_attention_layernorm, hidden, residual)
    gate_up = SharedWeight([mlp.gate_proj.weight, mlp.up_proj.weight], dtype).linear(normed)
    return SharedWeight([mlp.down_proj.weight], dtype).linear(swiglu(gate_up)), residual


def _by_head(attention: Attention, x: Tensor) -> Tensor:
    """Split rows into heads; [rows, heads, head_dim]."""
    return x.view(len(x), -1, attention.head_dim)


def _turn(own: Attention, norm: nn.Module, x: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """Queries or keys after their norm, rotated by their positions; [rows, heads, head_dim]."""
    assert isinstance(norm, RMSNorm), "layers are of the Qwen3 kind"
    return norm_and_rotate(_by_head(own, x), norm.weight, norm.eps, rope, positions)
