"""Reading external files: every JSON, NPY and safetensors file is read with these functions.

Each checks for common problems (missing, empty, a FIFO, a Git LFS pointer, a web page, truncated,
too large), so that the error has the file, the reason and the fix wherever the file is read.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.files import NotAFileError, open_regular

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MAX_JSON_BYTES = 64 * 2**20  # the largest index.json and tokenizer.json have a few dozen MB
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in its library
HEAD_BYTES = 4096  # searched for common placeholders
DOWNLOAD_AGAIN = "Download it again"


class UnreadableError(ValueError):
    """A file cannot be read: the reason and the fix.

    Args:
        file: The file.
        reason: Completes a sentence that begins with the file.
        hint: How to fix it; starts with a verb.
    """

    def __init__(self, file: Path, reason: str, *, hint: str) -> None:
        super().__init__(f"`{file}` {reason}")
        self.file = file
        self.reason = reason
        self.hint = hint


@contextmanager
def refusing(error: type[SpeculatorsError], *, flag: str | None = None) -> Iterator[None]:
    """Convert an `UnreadableError` of the block to `error`, which sets the exit code.

    Args:
        error: SettingsError for a path of a flag, DataError for a file of samples, CheckpointError
            for a draft.
        flag: Prefix of the message.
    """
    try:
        yield
    except UnreadableError as unreadable:
        message = str(unreadable) if flag is None else f"`{flag}`: {unreadable}"
        raise error(message, hint=unreadable.hint) from None


def read_json(file: Path, *, fix: str = DOWNLOAD_AGAIN, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file; CRLF and a byte order mark are accepted.

    Args:
        file: Any path.
        fix: The hint if the content is damaged.
        max_bytes: Maximum size.

    Raises:
        UnreadableError: It is not a complete JSON file.
    """
    return parse_json(read_text(file, fix=fix, max_bytes=max_bytes), file, fix=fix)


def read_json_object(
    file: Path, *, fix: str = DOWNLOAD_AGAIN, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON file whose content is an object, like `read_json`.

    Raises:
        UnreadableError: It is not a complete JSON file, or its content is not an object.
    """
    content = read_json(file, fix=fix, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise UnreadableError(file, f"holds {_describe(content)}, expected an object", hint=fix)
    return content


def parse_json(text: str, file: Path, *, fix: str, **how: Any) -> Any:
    """Parse the text of a JSON file; `how` is passed to `json.loads`.

    Raises:
        UnreadableError: It is not complete JSON.
    """
    try:
        return json.loads(text, **how)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        reason = "is truncated: its JSON ends early, in" if is_cut else f"is not JSON: {error.msg},"
        place = f"line {error.lineno}, column {error.colno}"
        raise UnreadableError(file, f"{reason} {place}", hint=fix) from None
    except RecursionError:
        raise UnreadableError(file, "is nested too deeply", hint=fix) from None
    except ValueError as error:  # a number of thousands of digits, or a value rejected by `how`
        raise UnreadableError(file, f"cannot be used: {error}", hint=fix) from None


def read_text(file: Path, *, fix: str = DOWNLOAD_AGAIN, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        UnreadableError: It is not a text file, or empty.
    """
    with opening(file) as descriptor:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes > max_bytes:
            reason = f"is too large: {num_bytes:,} bytes, expected at most {max_bytes:,}"
            raise UnreadableError(file, reason, hint=fix)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(max_bytes + 1)
    _check_content(file, data, fix)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        reason = "is UTF-16 text" if is_wide else f"is not UTF-8 text (at byte {error.start:,})"
        raise UnreadableError(file, f"{reason}, expected UTF-8", hint=fix) from None


@contextmanager
def opening(file: Path) -> Iterator[int]:
    """Open a regular file for reading, without blocking on a FIFO, and yield its descriptor.

    Raises:
        UnreadableError: It is missing, not a regular file, or not readable.
    """
    try:
        with open_regular(file) as stream:
            yield stream.fileno()
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise _open_error(file, error) from None


def _open_error(file: Path, error: OSError | ValueError) -> UnreadableError:
    if isinstance(error, NotAFileError):
        return UnreadableError(file, f"is {error.strerror}", hint="Pass the path of a file")
    if isinstance(error, FileNotFoundError):
        target = file.readlink() if file.is_symlink() else None
        reason = f"is a link to `{target}`, which does not exist" if target else "does not exist"
        return UnreadableError(file, reason, hint="Correct the path")
    if isinstance(error, PermissionError):
        return UnreadableError(
            file, "cannot be read: permission denied", hint=f"Run `chmod u+r {file}` as its owner"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UnreadableError(file, f"cannot be read: {reason}", hint="Check the path and the disk")


def check_content(file: Path, *, fix: str = DOWNLOAD_AGAIN) -> None:
    """Check that a file is regular and has data, not one of the common placeholders.

    Raises:
        UnreadableError: It is missing, empty, filled with zeros, an LFS pointer or a web page.
    """
    with opening(file) as descriptor:
        _check_content(file, os.pread(descriptor, HEAD_BYTES, 0), fix)


def _check_content(file: Path, head: bytes, fix: str) -> None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if not start:
        reason = "holds only blank space" if head else "is empty (0 bytes)"
        raise UnreadableError(file, reason, hint=fix)
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableError(
            file,
            "is a Git LFS pointer, not the file itself",
            hint=f"Run `git lfs pull` in `{file.parent}`",
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise UnreadableError(file, "is a web page, not the file itself", hint=fix)
    if not head.strip(b"\0"):
        raise UnreadableError(file, "is filled with zeros", hint=fix)


class Tensors:
    """An open safetensors file.

    Args:
        file: Its path, for error messages.
        content: The file as opened by the safetensors library.
        fix: The hint if the content is damaged.
    """

    def __init__(self, file: Path, content: Any, fix: str) -> None:
        self.file = file
        self._content = content
        self._fix = fix
        self._names = frozenset(content.keys())

    def names(self) -> list[str]:
        """Return the sorted names of all tensors."""
        return sorted(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def metadata(self) -> dict[str, str]:
        """Return the text beside the tensors."""
        found: dict[str, str] | None = self._content.metadata()
        return found or {}

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Read a tensor.

        Raises:
            UnreadableError: The file lacks it, or torch does not support its dtype.
        """
        tensor: torch.Tensor = self._get(self._content.get_tensor, name)
        return tensor

    def get_slice(self, name: str) -> Any:
        """Return a lazy tensor with `get_shape()`, `get_dtype()` and indexing.

        Raises:
            UnreadableError: The file lacks it.
        """
        return self._get(self._content.get_slice, name)

    def _get(self, read: Any, name: str) -> Any:
        from safetensors import SafetensorError

        if name not in self._names:
            raise UnreadableError(self.file, f"has no tensor `{name}`", hint=self._fix)
        try:
            return read(name)
        except (SafetensorError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            reason = f"has a tensor `{name}` that cannot be read: {first_line(error)}"
            raise UnreadableError(self.file, reason, hint=self._fix) from None


@contextmanager
def open_safetensors(file: Path, *, fix: str = DOWNLOAD_AGAIN) -> Iterator[Tensors]:
    """Open a safetensors file; only its header is read.

    Raises:
        UnreadableError: It is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    with opening(file) as descriptor:
        num_bytes, head = os.fstat(descriptor).st_size, os.pread(descriptor, HEAD_BYTES, 0)
    _check_content(file, head, fix)
    header_bytes = int.from_bytes(head[:8], "little")
    if len(head) < 8 or header_bytes > MAX_HEADER_BYTES:
        raise UnreadableError(file, "is not a safetensors file: it has no header", hint=fix)
    if 8 + header_bytes > num_bytes:
        reason = f"is truncated: it has {num_bytes:,} bytes, fewer than its header"
        raise UnreadableError(file, reason, hint=fix)
    try:
        with opening(file) as descriptor:
            content = safe_open(_utf8_name(file, descriptor), framework="pt")
    except SafetensorError as error:
        reason = first_line(error)
        if "not fully covered" in reason:
            reason = f"is truncated or damaged: its header does not match {num_bytes:,} bytes"
        else:
            reason = f"is damaged: {reason.removeprefix('Error while deserializing header: ')}"
        raise UnreadableError(file, reason, hint=fix) from None
    with content as tensors:
        yield Tensors(file, tensors, fix)


def _utf8_name(file: Path, descriptor: int) -> str:
    """Return a UTF-8 path for the library; the file is open as `descriptor`."""
    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{descriptor}"
    return os.fspath(file)


def read_npy(file: Path, *, fix: str = DOWNLOAD_AGAIN) -> "NDArray[np.generic]":
    """Read an array from a `.npy` file; no more memory is allocated than the file has bytes.

    Raises:
        UnreadableError: It is not a complete `.npy` file, or has Python objects.
    """
    import numpy as np

    check_content(file, fix=fix)
    try:
        with warnings.catch_warnings(action="ignore"):  # NumPy's warning about an unreadable header
            # Mapped first: fails if the header claims more data than the file has.
            return np.array(np.lib.format.open_memmap(file, mode="r"))
    except (ValueError, ArithmeticError, OSError, SyntaxError, TokenError, TypeError) as error:
        reason = first_line(error)
        if "mmap length" in reason:
            reason = "is truncated: it has less data than its header claims"
        else:
            reason = f"is not an array in NumPy's format: {reason}"
        raise UnreadableError(file, reason, hint=fix) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _describe(content: object) -> str:
    if content is None:
        return "null"
    return {list: "a list", str: "a text", bool: "true or false"}.get(type(content), "a number")
