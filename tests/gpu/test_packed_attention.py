"""FlashAttention and tiles over packed documents, and the plain path, against the definition."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.engines.packed_attention import Packing, packed_attention, packing
from speculators_cli.core.kernels.causal_attention import can_use_flash
from tests.attention_by_definition import attend_by_definition

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LENGTHS = (1, 100, 27, 300, 62)
# Weighted means of values of size 4, of scores of size 5 that are sums of up to 128 products.
# In bfloat16 weights and outputs are rounded to 8 bits; FlashAttention keeps scores in float32.
ATOL = {torch.float32: 4 * 5 * 128 * 6e-8, torch.bfloat16: 4 * 2 * 2**-9}


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (3, 3, 128), (4, 1, 40)])
@pytest.mark.parametrize("window", [None, 1, 33, 1000])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_packed_documents_match_the_definition(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    has_sinks: bool,
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query = torch.randn(tokens, heads, head_dim, device=CUDA, dtype=dtype)
    key, value = torch.randn(2, tokens, kv_heads, head_dim, device=CUDA, dtype=dtype)
    sinks = torch.randn(heads, device=CUDA, dtype=dtype) if has_sinks else None
    scale = head_dim**-0.5
    assert can_use_flash(CUDA, dtype, head_dim) == (dtype == torch.bfloat16)

    out = attend(query, key, value, LENGTHS, window=window, sinks=sinks)

    expected = attend_by_definition(
        query.cpu(), key.cpu(), value.cpu(), LENGTHS, scale=scale, window=window,
        sinks=None if sinks is None else sinks.cpu(),
    )  # fmt: skip
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("window", [None, 33])
def test_a_document_has_the_same_bits_wherever_it_is_packed(window: int | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(sum(LENGTHS), 8, 64, device=CUDA, dtype=torch.bfloat16)
    key, value = torch.randn(2, sum(LENGTHS), 2, 64, device=CUDA, dtype=torch.bfloat16)
    own = slice(101, 128)

    packed = attend(query, key, value, LENGTHS, window=window, sinks=None)[own]
    alone = attend(query[own], key[own], value[own], (27,), window=window, sinks=None)

    assert torch.equal(packed, alone)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    *,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    with packing(Packing(lengths, CUDA)):
        out, _ = packed_attention(
            torch.nn.Module(), query, key, value, None, sliding_window=window, s_aux=sinks
        )
    return out[0]
