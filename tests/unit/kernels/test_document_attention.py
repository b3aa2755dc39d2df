"""Attention over packed documents against its definition."""

from itertools import accumulate

import pytest
import torch

from speculators_cli.core.kernels.document_attention import document_attention, find_tiles
from tests.attention_by_definition import attend_by_definition


@pytest.mark.parametrize("is_head_first", [False, True], ids=["tokens first", "heads first"])
def test_each_token_attends_to_its_document_up_to_itself(
    rng: torch.Generator, is_head_first: bool
) -> None:
    lengths = (1, 130, 5, 200, 0, 128)
    query, key, value = (
        torch.randn(heads, sum(lengths), 64, generator=rng).transpose(0, 1) for heads in (6, 2, 2)
    )
    if not is_head_first:
        query, key, value = (x.contiguous() for x in (query, key, value))

    tiles = find_tiles((0, *accumulate(lengths)), query.device)
    out = document_attention(query, key, value, tiles, 0.3)

    expected = attend_by_definition(query, key, value, lengths, scale=0.3)
    # Weighted means of values of size 4, of scores that are sums of 64 products.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * 64 * 6e-8)


def test_tiles_with_the_most_keys_come_first() -> None:
    tiles = find_tiles((0, 100, 100, 250), torch.device("cpu"))

    assert tiles.tolist() == [
        [228, 100, 250], [64, 0, 100], [164, 100, 250], [0, 0, 100], [100, 100, 250]
    ]  # fmt: skip
