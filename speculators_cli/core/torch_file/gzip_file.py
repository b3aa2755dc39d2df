"""A gzip file as the file that is in it, unpacked into memory."""

import os
import tempfile
import zlib
from typing import BinaryIO

from speculators_cli.core.files import BUFFER_BYTES
from speculators_cli.core.torch_file.errors import TorchFileError

MAGIC = b"\x1f\x8b"
GZIP = 31  # what zlib calls the format, its checksum checked
# Hidden states hardly shrink; what grows far beyond this is made to fill memory.
MAX_RATIO = 16
SMALL_BYTES = 64 * 2**20  # may have any ratio


def is_gzip(stream: BinaryIO) -> bool:
    """Whether a file begins as a gzip file does."""
    return os.pread(stream.fileno(), len(MAGIC), 0) == MAGIC


def unpack(stream: BinaryIO) -> BinaryIO:
    """What is in a gzip file, in memory, as an open file.

    Raises:
        TorchFileError: It is damaged, cut, or unpacks to far more than a sample does.
    """
    most = max(SMALL_BYTES, MAX_RATIO * os.fstat(stream.fileno()).st_size)
    unpacked = _open_memory()
    try:
        _unpack(stream, unpacked, most)
    except zlib.error:
        unpacked.close()
        raise TorchFileError("is a damaged gzip file") from None
    except BaseException:
        unpacked.close()
        raise
    return unpacked


def _unpack(stream: BinaryIO, into: BinaryIO, most_bytes: int) -> None:
    member = zlib.decompressobj(GZIP)
    while packed := stream.read(BUFFER_BYTES):
        while packed:
            if member.eof:  # one file may be packed in several parts
                member = zlib.decompressobj(GZIP)
            into.write(member.decompress(packed, BUFFER_BYTES))
            packed = member.unused_data if member.eof else member.unconsumed_tail
            if into.tell() > most_bytes:
                raise TorchFileError(f"unpacks to more than {most_bytes:,} bytes")
    into.write(member.flush())
    if not member.eof:
        raise TorchFileError("is a truncated gzip file")


def _open_memory() -> BinaryIO:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):  # not on macOS
        return os.fdopen(os.memfd_create("sample"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
