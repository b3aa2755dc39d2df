"""Escape text from outside for Markdown: no formatting, links or HTML."""

import re
from collections.abc import Iterable

from speculators_cli.core.escaping import escape_line

# The start of markup or HTML, and what turns a bare address into a link.
_MARKUP = re.compile(r"[\\`*\[\]<>|~!#$&]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def text(value: object) -> str:
    """Plain text of one line."""
    return _MARKUP.sub(r"\\\g<0>", escape_line(str(value)))


def code(value: object) -> str:
    """A code span, also within a table cell, where a bar would end it."""
    line = escape_line(str(value)).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(lines: str) -> str:
    """A code block with one line."""
    line = escape_line(lines)
    fence = "`" * max(3, _longest_run(line) + 1)
    return f"{fence}text\n{line}\n{fence}"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, which are Markdown already."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _longest_run(line: str) -> int:
    return max(map(len, re.findall("`+", line)), default=0)
