"""stdout and stderr that outlive their reader and take any character."""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from speculators_cli.core.escaping import escape

# What is drawn with characters that not every encoding has, one for one.
_PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", ".:-=+*%#", strict=True)),
    **dict.fromkeys("─━═╌╍╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎╏╵╷╹╻", "|"),
    **dict.fromkeys("\u2013\u2014", "-"),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "«": "<<",
    "»": ">>",
    "…": "...",
}
_HANDLER = "speculators.plain"


class LastingFile(io.RawIOBase):
    """A descriptor to write to; once writing fails, the rest is dropped, and `error` says why.

    Args:
        descriptor: Stays open.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.error: OSError | None = None

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        """It is for nothing else."""
        return True

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write what the system takes at once, or drop all."""
        while self.error is None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.error = error
        return len(data)


class StandardStreams:
    """stdout and stderr of the process, replaced by ones that last."""

    def __init__(self) -> None:
        self.stdout = self._replace("stdout")
        self.stderr = self._replace("stderr")

    def finish(self) -> OSError | None:
        """Write what is held back; the error that lost a result, unless its reader left."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        error = self.stdout.error if self.stdout is not None else None
        # A reader that has seen enough, or a terminal that was closed.
        return None if error is None or error.errno in {errno.EPIPE, errno.EIO} else error

    @staticmethod
    def _replace(name: str) -> LastingFile | None:
        old = getattr(sys, name)
        # Streams that a caller of this process has put there are theirs.
        if old is None or old is not getattr(sys, f"__{name}__"):
            return None
        with suppress(OSError):
            old.flush()
        file = LastingFile(old.fileno())
        new = io.TextIOWrapper(
            io.BufferedWriter(file),  # type: ignore[type-var]
            encoding=old.encoding,
            errors=_HANDLER,
            line_buffering=old.line_buffering or name == "stderr",
            write_through=old.write_through,
        )
        setattr(sys, name, new)
        return file


@contextmanager
def lasting_streams() -> Iterator[StandardStreams]:
    """Let stdout and stderr outlive their reader within the block."""
    old = sys.stdout, sys.stderr
    streams = StandardStreams()
    try:
        yield streams
    finally:
        streams.finish()
        sys.stdout, sys.stderr = old


def open_missing_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: a data file of that number would be printed into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _write_plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "these streams are only written to"
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    if "\u2500" <= character <= "\u257f":  # corners and crossings
        return "+"
    return escape(character).encode("ascii", "backslashreplace").decode()


codecs.register_error(_HANDLER, _write_plain)
