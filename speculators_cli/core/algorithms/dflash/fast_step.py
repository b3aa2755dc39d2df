"""The blocks of a step with GPU kernels: the same function as the plain forward.

Weights are cast to the compute dtype once, and gradients are accumulated in float32. The keys and
values of the context are one product for all layers. What is as cheap to compute again as to read
is not kept for the backward: normalised rows, rotated queries and keys, and gated activations.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.blocks import Blocks
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.anchor_spans import AnchorSpans
from speculators_cli.core.kernels.block_attention import block_attention
from speculators_cli.core.kernels.block_context import LayerContext, share_context
from speculators_cli.core.kernels.head_norm import Rope
from speculators_cli.core.kernels.rms_norm import norm_linear, rms_norm
from speculators_cli.core.kernels.shared import Share, SharedWeight
from speculators_cli.core.kernels.swiglu import gated_linear
from speculators_cli.core.models.layers import DecoderLayer, RMSNorm


def predict(draft: DFlashTraining, batch: Batch, blocks: Blocks) -> Tensor:
    """What the LM head reads for each prediction; [anchors, predictions, hidden]."""
    config, dtype, device = draft.config, batch.aux_hidden_states.dtype, batch.input_ids.device
    # Each weight is read once forward and once backward: casting it again is cheaper than room.
    share = partial(SharedWeight, dtype=dtype, in_float8=draft.multiplies_in_float8, is_kept=False)
    longest = max(batch.lengths, default=0) + config.block_size + 1
    rope = draft.rotary(torch.arange(longest, device=device))
    layers: list[DecoderLayer] = list(draft.layers)  # type: ignore[arg-type]
    gains = _stack_gains(layers)
    context = _read_context(draft, layers, batch, gains[:, 1].contiguous(), rope, share)
    places = torch.arange(config.block_size, device=device)
    anchors = blocks.anchors
    positions = (batch.position_ids[anchors, None] + places).flatten()
    tokens = batch.input_ids[anchors]
    projected = _project_embeddings(draft, layers[0], tokens, dtype, share)
    residual = draft.embed_blocks(tokens).to(dtype)
    spans = _find_spans(draft, blocks, device)
    own = zip(layers, gains.unbind(), context, strict=True)
    for index, (layer, own_gains, own_context) in enumerate(own, 1):
        attended = block_attention(
            projected, own_context, own_gains, config.rms_norm_eps, rope, positions, spans
        )
        hidden, residual = _run_rest(layer, attended, residual, share)
        if index < len(layers):
            projected, residual = _project(layers[index], hidden, residual, share)
    normed, _ = rms_norm(hidden, draft.norm.weight, draft.norm.eps, add=residual)
    return normed.view(len(anchors), config.block_size, -1)[:, config.first_slot :]


def _project_embeddings(
    draft: DFlashTraining,
    first: DecoderLayer,
    tokens: Tensor,  # [anchors], int64: verifier ids
    dtype: torch.dtype,
    share: Share,
) -> Tensor:
    """Queries, keys and values of the first layer, where all masks have the same; [rows, out]."""
    mask = draft.embedding[draft.config.mask_token_id]
    embedded = torch.cat((draft.embedding[tokens], mask[None])).to(dtype)
    projected, _ = _project(first, embedded, None, share)
    masks = projected[-1].expand(len(tokens), draft.config.block_size - 1, -1)
    return torch.cat((projected[:-1, None], masks), dim=1).flatten(0, 1)


def _project(
    layer: DecoderLayer, hidden: Tensor, residual: Tensor | None, share: Share
) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of a layer, [rows, out]; `hidden + residual` to go on with."""
    norm, own = layer.input_layernorm, layer.self_attn
    weight = share([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
    return norm_linear(hidden, norm.weight, norm.eps, weight, add=residual)


def _find_spans(draft: DFlashTraining, blocks: Blocks, device: torch.device) -> AnchorSpans:
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


def _read_context(
    draft: DFlashTraining,
    layers: list[DecoderLayer],
    batch: Batch,
    gains: Tensor,  # [layers, head_dim]: weights of the norms of keys
    rope: Rope,
    share: Share,
) -> list[LayerContext]:
    """Keys and values of the context in each layer."""
    fused = share([draft.fc.weight]).linear(batch.aux_hidden_states)
    weights = [
        part.weight for layer in layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    norm = draft.hidden_norm
    projected, _ = norm_linear(fused, norm.weight, norm.eps, share(weights))
    # Padding, which no anchor reads, is at position 0.
    positions = (batch.position_ids - 1).clamp(min=0)
    return share_context(projected, gains, draft.config.rms_norm_eps, rope, positions)


def _run_rest(
    layer: DecoderLayer,
    attended: Tensor,  # [rows, heads, head_dim]
    residual: Tensor,  # [rows, hidden]: what the attention's result is to be added to
    share: Share,
) -> tuple[Tensor, Tensor]:
    """A layer after its attention; hidden states, and what is to be added to them."""
    own, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
    hidden = share([own.o_proj.weight]).linear(attended.flatten(1))
    gate_up, residual = norm_linear(
        hidden,
        norm.weight,
        norm.eps,
        share([mlp.gate_proj.weight, mlp.up_proj.weight]),
        add=residual,
    )
    return gated_linear(gate_up, share([mlp.down_proj.weight])), residual


def _stack_gains(layers: list[DecoderLayer]) -> Tensor:
    """Weights of the norms of queries and of keys in each layer; [layers, 2, head_dim]."""
    norms = [norm for layer in layers for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)]
    return torch.stack([_norm_of(norm).weight for norm in norms]).view(len(layers), 2, -1)


def _norm_of(module: nn.Module) -> RMSNorm:
    assert isinstance(module, RMSNorm), "layers are of the Qwen3 kind"
    return module
