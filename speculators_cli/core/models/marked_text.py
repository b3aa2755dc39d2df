"""Text of token ids, with the supervised part marked."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any


def mark_supervised(
    tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[bool]
) -> list[tuple[str, bool]]:
    """Return the text as spans, and whether each is supervised; special tokens are included."""
    pairs = zip(input_ids, loss_mask, strict=True)
    return [
        (str(tokenizer.decode([token_id for token_id, _ in run])), is_supervised)
        for is_supervised, run in groupby(pairs, key=lambda pair: pair[1])
    ]
