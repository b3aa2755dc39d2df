"""Attention of blocks to their context and to themselves, against the plain one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.attention import (
    BlockMemory,
    BlockShape,
    BlockSpans,
    find_groups,
)
from speculators_cli.core.kernels import anchor_spans
from speculators_cli.core.kernels.anchor_spans import AnchorSpans, can_attend
from speculators_cli.core.kernels.block_attention import HeadNorms, block_attention
from speculators_cli.core.kernels.head_norm import norm_and_rotate
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
    places = np.searchsorted(anchors, BOUNDS)
    plain_spans = BlockSpans(tuple(places.tolist()), BOUNDS, ANCHORS)
    groups = find_groups(shape, plain_spans, torch.from_numpy(anchors))
    first = np.array(BOUNDS)[np.searchsorted(BOUNDS, anchors, side="right") - 1]
    spans = AnchorSpans.of_anchors(
        first, anchors, BOUNDS[-1], CPU, size=size, window=window, is_causal=is_causal
    )
    num_tokens = len(ANCHORS) * size
    projected = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, generator=rng)
    context = torch.randn(2, BOUNDS[-1], kv_heads, head_dim, generator=rng)
    gains = 1 + torch.randn(2, head_dim, generator=rng)
    rope, positions = make_rope(50, head_dim), torch.randint(50, (num_tokens,), generator=rng)

    def fast(projected: Tensor, context: Tensor, gains: Tensor) -> Tensor:
        norms = HeadNorms(gains[0], gains[1], 1e-5)
        return block_attention(projected, context[0], context[1], norms, rope, positions, spans)

    def plain(projected: Tensor, context: Tensor, gains: Tensor) -> Tensor:
        parts = projected.view(num_tokens, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
        query, key = (
            norm_and_rotate(part, gain, 1e-5, rope, positions)
            for part, gain in zip(parts, gains, strict=False)
        )
        return BlockMemory(groups, context[0], context[1]).attend(query, key, parts[2])

    assert_same(fast, plain, projected, context, gains)


def make_rope(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_positions)[:, None] * torch.linspace(0.1, 1, head_dim // 2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def test_rows_of_the_context_may_be_apart_in_memory(rng: torch.Generator) -> None:
    spans = AnchorSpans.of_anchors(
        np.zeros(2, np.int64), np.array([3, 5]), 8, CPU, size=2, window=None, is_causal=False
    )
    projected = torch.randn(4, 4 * 8, generator=rng)
    # Keys and values beside each other, as a product of stacked weights gives them.
    key, value = torch.randn(8, 2, 1, 8, generator=rng).unbind(1)
    norms = HeadNorms(torch.ones(8), torch.ones(8), 1e-5)
    own = (norms, make_rope(9, 8), torch.tensor([4, 5, 6, 7]), spans)

    spread = block_attention(projected, key, value, *own)
    packed = block_attention(projected, key.contiguous(), value.contiguous(), *own)

    assert not key.is_contiguous()
    assert torch.equal(spread, packed)


def test_a_block_that_no_tile_has_room_for_is_told_apart() -> None:
    assert can_attend(16, num_heads=32, num_kv_heads=4)
    assert not can_attend(17, num_heads=32, num_kv_heads=4)
