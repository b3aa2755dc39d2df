"""Rows of a JSON file, one at a time: an object per line, or a list of objects."""

import json
from collections.abc import Callable, Generator, Iterator
from functools import partial
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from speculators_cli.core.conversations.prompts import BadRowError
from speculators_cli.core.files import open_regular
from speculators_cli.core.reading import DOWNLOAD_AGAIN, UnreadableError, check_content

MAX_ROW_BYTES = 64 * 2**20
BUFFER_BYTES = 2**20
BLANK = " \t\r\n"
BOM = b"\xef\xbb\xbf"

Decode = Callable[[], object]  # the row; raises BadRowError
Rows = Generator[tuple[str, Decode]]  # with the place of each row


def read_json_rows(file: Path) -> Rows:
    """Yield the place of each row within a file, and a function that decodes it.

    Raises:
        UnreadableError: It is neither JSON lines nor a list.
    """
    check_content(file)
    raw: Any = open_regular(file)
    with BufferedReader(raw, BUFFER_BYTES) as stream:
        if _begins_with_list(stream):
            yield from _read_list(stream, file)
        else:
            yield from _read_lines(stream)


def _begins_with_list(stream: BufferedReader) -> bool:
    return stream.peek(BUFFER_BYTES).removeprefix(BOM).lstrip()[:1] == b"["


def _read_lines(stream: BufferedReader) -> Rows:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        is_too_long = len(line) == MAX_ROW_BYTES and not line.endswith(b"\n")
        while is_too_long and (rest := stream.readline(MAX_ROW_BYTES)):
            if rest.endswith(b"\n"):
                break
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            decode = _refuse_long if is_too_long else partial(_decode_line, line.rstrip(b"\r\n"))
            yield f"line {number:,}", decode


def _decode_line(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 text (at byte {error.start:,})") from None
    except json.JSONDecodeError as error:
        raise BadRowError(f"is not JSON: {error.msg}, at column {error.colno:,}") from None
    except RecursionError:
        raise BadRowError("is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRowError(f"cannot be used: {error}") from None


def _refuse_long() -> object:
    raise BadRowError(f"has more than {MAX_ROW_BYTES:,} bytes")


def _read_list(stream: BufferedReader, file: Path) -> Rows:
    """Decode a list item by item: it may be larger than memory."""
    number = 0
    try:
        with TextIOWrapper(stream, "utf-8-sig") as text:
            for item in _ListItems(text):
                number += 1
                yield f"item {number:,}", partial(_identity, item)
    except UnicodeDecodeError:
        reason = f"is not UTF-8 text after item {number:,}"
        raise UnreadableError(file, reason, hint=DOWNLOAD_AGAIN) from None
    except RecursionError:
        reason = f"is nested too deeply after item {number:,}"
        raise UnreadableError(file, reason, hint=DOWNLOAD_AGAIN) from None
    except ValueError as error:
        reason = f"is not a complete JSON list, after item {number:,}: {error}"
        raise UnreadableError(file, reason, hint=DOWNLOAD_AGAIN) from None


def _identity(item: object) -> object:
    return item


class _ListItems:
    """The items of a JSON list in a stream of text."""

    def __init__(self, stream: TextIOWrapper) -> None:
        self._stream = stream
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[object]:
        self._take("[")
        if self._peek() == "]":
            return
        while True:
            yield self._decode()
            if self._peek() == "]":
                return
            self._take(",")

    def _take(self, expected: str) -> None:
        found = self._peek()
        if found != expected:
            raise ValueError(f"expected `{expected}`, found `{found or 'its end'}`")
        self._at += 1

    def _peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in BLANK:
                    return self._text[self._at]
                self._at += 1
            if not self._read_more(BUFFER_BYTES):
                return ""

    def _decode(self) -> object:
        self._peek()
        num_chars = BUFFER_BYTES
        while True:
            try:
                item, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_long = len(self._text) - self._at > MAX_ROW_BYTES
                if is_long or not self._read_more(num_chars):
                    raise ValueError(error.msg) from None
                num_chars *= 2  # a long item is decoded a few times only
                continue
            self._at = end
            return item

    def _read_more(self, num_chars: int) -> bool:
        more = self._stream.read(num_chars)
        self._text = self._text[self._at :] + more
        self._at = 0
        return more != ""
