"""Typed access to the values of a third-party config.json."""

import math
from collections.abc import Mapping
from typing import Any

from speculators_cli.core.errors import CheckpointError

MAX_SIZE = 2**31 - 1
SWITCHES = {"true": True, "false": False, "1": True, "0": False}


class Values:
    """The values of one JSON object; `null` counts as missing.

    Numbers and booleans written as strings are accepted, as are 0 and 1 for a boolean; any other
    type mismatch is an error.

    Args:
        content: The JSON object.
        name: Name of the draft, for error messages.
        path: Path of the object in config.json; ends with a dot.
    """

    def __init__(self, content: Mapping[str, Any], name: str, path: str = "") -> None:
        self.content = content
        self.name = name
        self.path = path

    def has(self, key: str) -> bool:
        """Return whether the key has a value."""
        return self.content.get(key) is not None

    def size(self, key: str) -> int | None:
        """Return a positive integer."""
        value = self.content.get(key)
        if value is None:
            return None
        number = _whole(value)
        if number is None or not 0 < number <= MAX_SIZE:
            raise self.error(key, f"a whole number from 1 to {MAX_SIZE:,}")
        return number

    def token(self, key: str) -> int | None:
        """Return a token id, which may be 0."""
        value = self.content.get(key)
        number = _whole(value)
        if value is not None and (number is None or not 0 <= number <= MAX_SIZE):
            raise self.error(key, "a token id")
        return number

    def number(self, key: str) -> float | None:
        """Return a positive number."""
        value = self.content.get(key)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise self.error(key, "a positive number")
        return number

    def switch(self, key: str) -> bool | None:
        """Return a boolean."""
        value = self.content.get(key)
        if value is None or isinstance(value, bool):
            return value
        found = SWITCHES.get(str(value).lower()) if isinstance(value, str | int) else None
        if found is None:
            raise self.error(key, "`true` or `false`")
        return found

    def text(self, key: str) -> str | None:
        """Return a string."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; a single string counts as a list of one."""
        value = self.content.get(key)
        listed = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise self.error(key, "a list of strings")
        return tuple(listed)

    def layer_ids(self, key: str) -> tuple[int, ...]:
        """Return a list of non-negative integers."""
        value = self.content.get(key)
        listed = [] if value is None else value
        ids = [_whole(item) for item in listed] if isinstance(listed, list) else [None]
        read = tuple(item for item in ids if item is not None and 0 <= item <= MAX_SIZE)
        if len(read) != len(ids):
            raise self.error(key, "a list of layer ids")
        return read

    def part(self, key: str) -> "Values":
        """Return the object of a key; an empty one if missing."""
        value = self.content.get(key)
        content = {} if value is None else value
        if not isinstance(content, dict):
            raise self.error(key, "an object")
        return Values(content, self.name, f"{self.path}{key}.")

    def first_part(self, key: str) -> "Values":
        """Return the first object of a key's list; an empty one if missing."""
        value = self.content.get(key)
        listed = [] if value is None else value
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise self.error(key, "a list of objects")
        return Values(listed[0] if listed else {}, self.name, f"{self.path}{key}.0.")

    def error(self, key: str, expected: str) -> CheckpointError:
        """Build the error for an invalid value."""
        shown = str(self.content.get(key))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return CheckpointError(
            f"The config.json of `{self.name}` has `{self.path}{key}` `{shown}`, expected "
            f"{expected}",
            hint=f"Correct `{self.path}{key}` in config.json, or download it again",
        )


def _whole(value: Any) -> int | None:
    """Convert an integer, which may be a string or have a zero fraction."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and len(value) <= 12:
        try:
            return int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None
