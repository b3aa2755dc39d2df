"""Rows of a table, decoded in batches."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from speculators_cli.core.conversations.prompts import BadRowError
from speculators_cli.core.reading import first_line

BATCH_ROWS = 256  # decoded at once


class TableRows:
    """Consecutive rows of a table, decoded when the first of them is needed.

    Args:
        decode: Returns the rows.
    """

    def __init__(self, decode: Callable[[], list[dict[str, Any]]]) -> None:
        self._decode = decode

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return self._decode()

    def row(self, at: int) -> object:
        """Return a row.

        Raises:
            BadRowError: A value cannot be decoded.
        """
        try:
            return drop_missing(self._rows[at])
        except ValueError as error:
            raise BadRowError(f"cannot be decoded: {first_line(error)}") from None


def drop_missing(value: object) -> object:
    """Remove keys without a value: a table has the keys of all rows in each of them."""
    if isinstance(value, dict):
        return {key: drop_missing(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [drop_missing(item) for item in value]
    return value
