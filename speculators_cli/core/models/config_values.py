"""Values: what a config.json of someone else holds, each value of the type it must have."""

import math
from collections.abc import Mapping
from typing import Any

from speculators_cli.core.errors import CheckpointError

MAX_SIZE = 2**31 - 1
SWITCHES = {"true": True, "false": False, "1": True, "0": False}


class Values:
    """The values of one JSON object, where `null` is nothing.

    Numbers and switches that stand as text are read, as are 0 and 1 for a switch; everything else
    of another type is an error.

    Args:
        content: The object.
        name: The draft's, for messages.
        path: Where the object is in config.json; ends in a dot.
    """

    def __init__(self, content: Mapping[str, Any], name: str, path: str = "") -> None:
        self.content = content
        self.name = name
        self.path = path

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self.content.get(key) is not None

    def size(self, key: str) -> int | None:
        """A positive whole number."""
        value = self.content.get(key)
        if value is None:
            return None
        number = _whole(value)
        if number is None or not 0 < number <= MAX_SIZE:
            raise self.error(key, f"a whole number from 1 to {MAX_SIZE:,}")
        return number

    def number(self, key: str) -> float | None:
        """A positive number."""
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
        """True or false."""
        value = self.content.get(key)
        if value is None or isinstance(value, bool):
            return value
        found = SWITCHES.get(str(value).lower()) if isinstance(value, str | int) else None
        if found is None:
            raise self.error(key, "`true` or `false`")
        return found

    def text(self, key: str) -> str | None:
        """Text."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; one alone is a list of it."""
        value = self.content.get(key)
        listed = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise self.error(key, "a list of texts")
        return tuple(listed)

    def layer_ids(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0."""
        value = self.content.get(key)
        listed = [] if value is None else value
        ids = [_whole(item) for item in listed] if isinstance(listed, list) else [None]
        read = tuple(item for item in ids if item is not None and 0 <= item <= MAX_SIZE)
        if len(read) != len(ids):
            raise self.error(key, "a list of layer ids")
        return read

    def part(self, key: str) -> "Values":
        """The object below a key; an empty one if there is none."""
        value = self.content.get(key)
        content = {} if value is None else value
        if not isinstance(content, dict):
            raise self.error(key, "an object")
        return Values(content, self.name, f"{self.path}{key}.")

    def first_part(self, key: str) -> "Values":
        """The first object of the list below a key; an empty one if there is none."""
        value = self.content.get(key)
        listed = [] if value is None else value
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise self.error(key, "a list of objects")
        return Values(listed[0] if listed else {}, self.name, f"{self.path}{key}.0.")

    def error(self, key: str, expected: str) -> CheckpointError:
        """What is wrong with a value."""
        shown = str(self.content.get(key))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return CheckpointError(
            f"The config.json of `{self.name}` has `{self.path}{key}` `{shown}`, expected "
            f"{expected}",
            hint=f"Correct `{self.path}{key}` in it, or download it again",
        )


def _whole(value: Any) -> int | None:
    """A whole number, which may stand as text or with a zero after the point."""
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
