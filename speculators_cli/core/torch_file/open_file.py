"""An open file whose bytes are read directly into their destination.

Files are not memory-mapped: an access to a mapped file that has shrunk ends the process.
"""

import ctypes
import errno
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.torch_file.errors import ChangedFileError, TorchFileError

MAX_PIECES = 1024  # of memory that one system call fills (IOV_MAX)
MAX_READ_BYTES = 2**28  # beside hidden states: ids of 32 million tokens
Bytes = NDArray[np.uint8]
_system_preadv = ctypes.CDLL(None, use_errno=True).preadv
_system_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_system_preadv.restype = ctypes.c_ssize_t


class OpenFile:
    """A file that is open until it is closed or no longer referenced.

    Args:
        stream: The open file.
        path: Its name, for messages.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.path = path
        self.descriptor = stream.fileno()
        self.num_bytes = os.fstat(self.descriptor).st_size
        self.close = weakref.finalize(self, stream.close)

    def read(self, start: int, num_bytes: int) -> bytes:
        """Read some bytes; fewer at the end of the file.

        Raises:
            TorchFileError: `num_bytes` is larger than any tensor other than hidden states.
        """
        if num_bytes > MAX_READ_BYTES:
            raise TorchFileError(f"claims {num_bytes:,} bytes beside its hidden states")
        return os.pread(self.descriptor, num_bytes, start)

    def fill(self, into: Bytes, start: int) -> None:
        """Fill contiguous memory with the bytes of the file from `start` on.

        Raises:
            ChangedFileError: The file is shorter than before, or cannot be read.
        """
        self.scatter(np.array([[into.ctypes.data, into.nbytes]]), start)

    def scatter(
        self,
        pieces: NDArray[np.int64],  # [pieces, 2]: address and bytes of each; none is negative
        start: int,
    ) -> None:
        """Fill pieces of memory in order with the bytes of the file from `start` on.

        Raises:
            ChangedFileError: The file is shorter than before, or cannot be read.
        """
        while len(pieces):
            some = np.ascontiguousarray(pieces[:MAX_PIECES])
            num_read = _preadv(self.descriptor, some, start)
            if num_read < 0:
                reason = os.strerror(ctypes.get_errno())
                raise ChangedFileError(self.path, f"fails: {reason}")
            ends = some[:, 1].cumsum()
            if num_read == 0 and ends[-1]:
                raise ChangedFileError(self.path, "is shorter than it was")
            start += num_read
            num_done = int(np.searchsorted(ends, num_read, side="right"))
            pieces = pieces[num_done:]
            if num_done < len(some):  # a read may be partial
                begun = num_read - (int(ends[num_done - 1]) if num_done else 0)
                pieces = pieces.copy()
                pieces[0] += (begun, -begun)


class TensorFile:
    """A file of tensors, closed at the end of a `with` block unless it was lent.

    Args:
        source: The open file.
    """

    def __init__(self, source: OpenFile) -> None:
        self.source = source
        self._is_lent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file; a lent one only after an error."""
        if error is not None or not self._is_lent:
            self.source.close()

    def lend(self) -> OpenFile:
        """The file, which then stays open as long as it is referenced."""
        self._is_lent = True
        return self.source


def _preadv(descriptor: int, pieces: NDArray[np.int64], start: int) -> int:
    """Call `preadv` without the interpreter lock; returns the bytes read, or -1.

    `os.preadv` would take an object for each piece, and hold the interpreter while it does.
    """
    while True:
        num_read: int = _system_preadv(descriptor, pieces.ctypes.data, len(pieces), start)
        if num_read >= 0 or ctypes.get_errno() != errno.EINTR:
            return num_read
