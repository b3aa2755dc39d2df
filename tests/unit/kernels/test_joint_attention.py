"""Attention of some rows to all keys and to their own of later steps, against the plain one."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.attention import plain_attention
from speculators_cli.core.kernels.joint_attention import joint_attention
from speculators_cli.core.kernels.spans import Spans
from tests.gradients import assert_same
from tests.tiny_drafts import attend_from, lay_out

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (6, 2, 12), (3, 3, 8)])
def test_joint_attention_of_some_rows_equals_the_plain_one_of_all(
    num_steps: int, heads: int, kv_heads: int, head_dim: int, rng: torch.Generator
) -> None:
    bounds = (0, 5, 6, 13, 16)
    rows = torch.tensor([2, 4, 8, 9, 12])  # none of the second document, nor of the padding
    spans = Spans.of_rows(bounds, rows.numpy(), CPU)
    query = torch.randn(16, heads, head_dim, generator=rng)
    parts = [torch.randn(16, kv_heads, head_dim, generator=rng) for _ in range(2 * num_steps)]

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        return attend_from(rows, spans, query, *parts)

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts)[rows]

    assert_same(fast, plain, query, *parts)


@pytest.mark.parametrize(("num_steps", "window"), [(1, 1), (1, 4), (3, 3), (3, 5), (3, 9)])
def test_joint_attention_with_a_window_equals_the_plain_one(
    num_steps: int, window: int, rng: torch.Generator
) -> None:
    bounds = (0, 5, 6, 13, 16)
    rows = torch.tensor([2, 4, 8, 9, 12])
    spans = Spans.of_rows(bounds, rows.numpy(), CPU)
    query = torch.randn(16, 4, 8, generator=rng)
    parts = [torch.randn(16, 2, 8, generator=rng) for _ in range(2 * num_steps)]

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        return attend_from(rows, spans, query, *parts, window=window)

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts, window=window)[rows]

    if (num_steps, window) == (1, 1):
        # The softmax of one score has no gradient of the query and the key.
        torch.testing.assert_close(fast(query, *parts), plain(query, *parts))
    else:
        assert_same(fast, plain, query, *parts)


def test_joint_attention_of_all_rows_equals_the_plain_one(rng: torch.Generator) -> None:
    bounds = (0, 5, 6, 13)
    parts = [torch.randn(13, 2, 8, generator=rng) for _ in range(4)]

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        return joint_attention(query, parts[:2], parts[2:], Spans.of_documents(bounds, CPU))

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts)

    assert_same(fast, plain, torch.randn(13, 4, 8, generator=rng), *parts)


def test_own_keys_of_rows_that_do_not_attend_are_not_read(rng: torch.Generator) -> None:
    bounds, rows = (0, 5, 6, 13), torch.tensor([2, 4, 9])
    spans = Spans.of_rows(bounds, rows.numpy(), CPU)
    query = torch.randn(3, 4, 8, generator=rng)
    first_key, first_value = torch.randn(2, 13, 2, 8, generator=rng)
    # Keys of two steps, then values; two rows too many.
    own = torch.randn(4, 5, 2, 8, generator=rng)

    def attend(query: Tensor, *own: Tensor) -> Tensor:
        keys, values = (first_key, *own[:2]), (first_value, *own[2:])
        return joint_attention(lay_out(query, spans), keys, values, spans)

    def attend_with_these(query: Tensor, *own: Tensor) -> Tensor:
        return attend(query, *(x[:3] for x in own))

    assert_same(attend, attend_with_these, query, *own)
