"""Attention over packed documents against its definition."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.engines import packed_attention as module
from speculators_cli.core.engines.packed_attention import Packing, packed_attention, packing
from tests.attention_by_definition import attend_by_definition

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 6, 2, 8, 5
LENGTHS = (1, 7, 4, 23, 9)
CPU = torch.device("cpu")
# Outputs are weighted means of values of size 3. A score is a sum of 8 products, and rounding it
# changes a weight by as much: 8 roundings of scores of size 5. In bfloat16 it is rounded once, to
# 8 bits, and the output as well.
ATOL = {torch.float32: 3 * 8 * 5 * 6e-8, torch.bfloat16: 3 * (5 + 1) * 2**-9}


def random_parts(
    num_tokens: int, dtype: torch.dtype = torch.float32, *, kv_heads: int = KV_HEADS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value, with tokens first, and sinks."""
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=rng).to(dtype)
    key = torch.randn(num_tokens, kv_heads, HEAD_DIM, generator=rng).to(dtype)
    value = torch.randn(num_tokens, kv_heads, VALUE_DIM, generator=rng).to(dtype)
    return query, key, value, torch.randn(HEADS, generator=rng).to(dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Call it as a layer of transformers does."""
    layer = torch.nn.Module()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    with packing(Packing(lengths, CPU)):
        out, weights = packed_attention(
            layer,
            query,
            key,
            value,
            None,
            scaling=scale,
            sliding_window=window,
            softcap=softcap,
            s_aux=sinks,
            dropout=0.0,
        )
    assert weights is None
    return out[0]


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_packed_documents_match_the_definition(
    dtype: torch.dtype, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    query, key, value, sinks = random_parts(sum(LENGTHS), dtype)
    given = sinks if has_sinks else None

    out = attend(query, key, value, LENGTHS, scale=0.4, window=window, softcap=softcap, sinks=given)

    expected = attend_by_definition(
        query, key, value, LENGTHS, scale=0.4, window=window, softcap=softcap, sinks=given
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("kv_heads", [1, 3, HEADS])
@pytest.mark.parametrize("window", [None, 5])
def test_heads_share_keys_in_groups(kv_heads: int, window: int | None) -> None:
    query, key, value, _ = random_parts(sum(LENGTHS), kv_heads=kv_heads)

    out = attend(query, key, value, LENGTHS, window=window)

    # Without a scale, that of the head's width.
    expected = attend_by_definition(query, key, value, LENGTHS, scale=HEAD_DIM**-0.5, window=window)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ATOL[torch.float32])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("window", [2, 4, 6])
def test_queries_of_every_part_see_the_keys_before_them(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int
) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 4)
    query, key, value, sinks = random_parts(length)

    out = attend(query, key, value, (length,), scale=0.4, window=window, sinks=sinks)

    expected = attend_by_definition(
        query, key, value, (length,), scale=0.4, window=window, sinks=sinks
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ATOL[torch.float32])


@pytest.mark.parametrize("window", [None, 5])
def test_no_document_sees_another(window: int | None) -> None:
    query, key, value, sinks = random_parts(sum(LENGTHS))
    before = attend(query, key, value, LENGTHS, window=window, sinks=sinks)
    key[8:12], value[8:12] = key[8:12] + 1, value[8:12] + 1  # the third document

    after = attend(query, key, value, LENGTHS, window=window, sinks=sinks)

    is_same = (before == after).all(-1).all(-1)
    assert not is_same[8:12].any()
    assert is_same[:8].all()
    assert is_same[12:].all()


def test_calls_and_windows_are_counted() -> None:
    query, key, value, _ = random_parts(6)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))

    with packing(Packing((2, 4), CPU)) as documents:
        packed_attention(torch.nn.Module(), query, key, value, None)
        has_window_before = documents.has_window
        packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=3)

    assert documents.num_calls == 2
    assert (has_window_before, documents.has_window) == (False, True)


def test_a_mask_is_refused() -> None:
    query, key, value, _ = random_parts(6)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))

    with packing(Packing((6,), CPU)), pytest.raises(NotImplementedError, match="mask"):
        packed_attention(torch.nn.Module(), query, key, value, torch.ones(1, 1, 6, 6))


def test_packed_attention_without_documents_is_a_bug() -> None:
    query, key, value, _ = random_parts(6)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))

    with pytest.raises(AssertionError, match="packing"):
        packed_attention(torch.nn.Module(), query, key, value, None)
