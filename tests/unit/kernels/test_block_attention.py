"""Attention of blocks to their context and to themselves, against the plain one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.algorithms.dflash.attention import (
    BlockMemory,
    BlockShape,
    BlockSpans,
    find_groups,
)
from speculators_cli.core.kernels import anchor_spans
from speculators_cli.core.kernels.anchor_spans import AnchorSpans, can_attend
from speculators_cli.core.kernels.block_attention import block_attention
from speculators_cli.core.kernels.block_context import share_context
from speculators_cli.core.models.layers import rotate
from tests.gradients import assert_same

CPU = torch.device("cpu")
BOUNDS = (0, 9, 10, 40, 44)  # the last four rows are padding
ANCHORS = (2, 3, 8, 11, 20, 21, 22, 39)  # none in the second document


# Heads change no mask: each mask has some, and the first one all.
CASES = [
    (4, None, False, 4, 2, 8),
    (4, None, False, 6, 2, 12),
    (4, None, False, 3, 3, 8),
    (3, None, True, 6, 2, 12),
    (4, 6, False, 3, 3, 8),
    (4, 2, True, 4, 2, 8),
    (5, 2, False, 6, 2, 12),
    (3, 25, True, 3, 3, 8),
]


@pytest.mark.parametrize(("size", "window", "is_causal", "heads", "kv_heads", "head_dim"), CASES)
def test_block_attention_equals_the_plain_one(
    size: int,
    window: int | None,
    is_causal: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several blocks in a tile, and several tiles of the context.
    monkeypatch.setattr(anchor_spans, "FLOAT32_BLOCKS", 3)
    monkeypatch.setattr(anchor_spans, "TILE_KEYS", 16)
    shape = BlockShape(size, window, is_causal)
    anchors = np.array(ANCHORS)
    anchor_bounds = tuple(np.searchsorted(anchors, BOUNDS).tolist())
    plain_spans = BlockSpans(anchor_bounds, BOUNDS, ANCHORS)
    groups = find_groups(shape, plain_spans, torch.from_numpy(anchors))
    first = np.array(BOUNDS)[np.searchsorted(BOUNDS, anchors, side="right") - 1]
    spans = AnchorSpans.of_anchors(
        first, anchors, BOUNDS[-1], CPU, size=size, window=window, is_causal=is_causal
    )
    num_tokens = len(ANCHORS) * size
    projected = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, generator=rng)
    # Of two layers, each with keys and values.
    context = torch.randn(BOUNDS[-1], 2 * 2 * kv_heads * head_dim, generator=rng)
    gains, context_gains = (1 + torch.randn(n, head_dim, generator=rng) for n in (2, 2))
    rope, positions = make_rope(50, head_dim), torch.randint(50, (num_tokens,), generator=rng)
    places = torch.randint(50, (BOUNDS[-1],), generator=rng)

    def fast(projected: Tensor, context: Tensor, gains: Tensor, context_gains: Tensor) -> Tensor:
        layers = share_context(context, context_gains, 1e-5, rope, places)
        own = (gains, 1e-5, rope, positions, spans)
        return torch.stack([block_attention(projected, layer, *own) for layer in layers])

    def plain(projected: Tensor, context: Tensor, gains: Tensor, context_gains: Tensor) -> Tensor:
        parts = projected.view(num_tokens, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
        query, key = (
            norm_and_rotate(part, gain, rope, positions)
            for part, gain in zip(parts, gains, strict=False)
        )
        results = []
        layers = context.view(len(context), 2, 2, kv_heads, head_dim).unbind(1)
        for layer, gain in zip(layers, context_gains, strict=True):
            seen = norm_and_rotate(layer[:, 0], gain, rope, places)
            memory = BlockMemory(groups, seen, layer[:, 1])
            results.append(memory.attend(query, key, parts[2]))
        return torch.stack(results)

    # Gradients of gains are sums of hundreds of terms.
    assert_same(fast, plain, projected, context, gains, context_gains, tolerance=5e-5)


def norm_and_rotate(
    x: Tensor, gain: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor
) -> Tensor:
    cos, sin = rope
    return rotate(F.rms_norm(x, gain.shape, gain, 1e-5), (cos[positions], sin[positions]))


def make_rope(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_positions)[:, None] * torch.linspace(0.1, 1, head_dim // 2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def test_a_block_that_no_tile_has_room_for_is_told_apart() -> None:
    assert can_attend(16, num_heads=32, num_kv_heads=4)
    assert not can_attend(17, num_heads=32, num_kv_heads=4)
