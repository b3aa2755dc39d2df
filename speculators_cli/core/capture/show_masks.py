"""Rows of tokens as text, for `--show-masks`."""

from dataclasses import dataclass
from typing import Any

from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.models.marked_text import mark_supervised


@dataclass(frozen=True)
class MarkedRow:
    """One row as text."""

    name: str
    spans: tuple[tuple[str, bool], ...]  # text, and whether it is supervised


def mark_row(tokenizer: Any, row: TokenRow) -> list[tuple[str, bool]]:
    """Return the text of a row as spans, and whether each is supervised."""
    return mark_supervised(tokenizer, row.input_ids.tolist(), row.loss_mask.tolist())
