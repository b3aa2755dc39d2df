"""A zip archive of uncompressed records, as `torch.save` writes it.

Each record is a header and then its bytes. After the last one comes the directory, which names
every record with its size, CRC-32 and place; then the end record, which says where the directory
is. What does not fit 32 bits stands in a zip64 extra field, or in a zip64 end record before the end
record. (PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.)
"""

import os
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from speculators_cli.core.files import BUFFER_BYTES, copy_range, write_at

# Versions, dates and numbers of disks are skipped, and written as zeros, as torch writes them.
# Signature, flags, method, CRC, size as stored, size, lengths of name and extra fields.
LOCAL_HEADER = struct.Struct("<4s2x2H4x3I2H")
# The same, then the length of the comment and where the record's header begins.
ENTRY = struct.Struct("<4s4x2H4x3I3H8xI")
END = struct.Struct("<4s4x2H2I2x")  # signature, records (twice), bytes and place of the directory
ZIP64_END = struct.Struct("<4sQ12x4Q")  # the same, after the bytes that follow
ZIP64_LOCATOR = struct.Struct("<4s4xQI")  # signature, place of the zip64 end record, disks
EXTRA = struct.Struct("<HH")  # kind, bytes that follow

NAMES_ARE_UTF8 = 0x800
WIDER = 0xFFFFFFFF  # in a header: see the zip64 extra field
LARGEST = WIDER - 1  # that a header holds
ZIP64, PADDING = 1, 0x4246  # kinds of extra fields; torch pads with the same
ALIGNMENT = 64  # of a record's bytes, so that tensors can be mapped
TAIL_BYTES = 4096  # of a file, almost always containing the directory of a sample
MAX_DIRECTORY_BYTES = 8 * 2**20


class Record(NamedTuple):
    """A record, as listed in the directory."""

    header: int  # file offset of its header
    num_bytes: int
    crc: int
    is_stored: bool  # neither compressed nor encrypted


def read_directory(file: int, num_bytes: int) -> dict[str, Record]:
    """The records of an archive by their names, in order; their bytes are not read.

    Args:
        file: Descriptor of the archive.
        num_bytes: Its size.

    Raises:
        ValueError: This is no archive, or it is cut or damaged.
    """
    tail_start = max(num_bytes - TAIL_BYTES, 0)
    tail = os.pread(file, TAIL_BYTES, tail_start)
    end = num_bytes - tail_start - END.size
    if end < 0 or not tail.startswith(b"PK\5\6", end):
        raise ValueError("no end record")
    *_, size, start = END.unpack_from(tail, end)
    locator = end - ZIP64_LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\6\7", locator):
        _, place, _ = ZIP64_LOCATOR.unpack_from(tail, locator)
        if place > num_bytes:
            raise ValueError("no zip64 end record")
        *_, size, start = ZIP64_END.unpack(os.pread(file, ZIP64_END.size, place))
    if size > MAX_DIRECTORY_BYTES or start + size > num_bytes:
        raise ValueError("no directory")
    if start >= tail_start:
        return _parse(tail[start - tail_start : start - tail_start + size])
    return _parse(os.pread(file, size, start))


def _parse(directory: bytes) -> dict[str, Record]:
    records = {}
    at = 0
    while at < len(directory):
        signature, flags, method, crc, *sizes, header = ENTRY.unpack_from(directory, at)
        if signature != b"PK\1\2":
            raise ValueError("not an entry")
        compressed, num_bytes, len_name, len_extra, len_comment = sizes
        name_end = at + ENTRY.size + len_name
        name = directory[at + ENTRY.size : name_end].decode()
        if WIDER in (num_bytes, compressed, header):
            extra = directory[name_end : name_end + len_extra]
            num_bytes, compressed, header = _widen(extra, num_bytes, compressed, header)
        is_stored = method == 0 and num_bytes == compressed and not flags & 1
        records[name] = Record(header, num_bytes, crc, is_stored)
        at = name_end + len_extra + len_comment
    return records


def _widen(extra: bytes, *values: int) -> list[int]:
    """Values of which those at the limit are in the zip64 extra field, in this order."""
    at = 0
    while at < len(extra):
        kind, size = EXTRA.unpack_from(extra, at)
        at += EXTRA.size
        if kind == ZIP64:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, at))
            return [next(wide, value) if value == WIDER else value for value in values]
        at += size
    raise ValueError("no zip64 extra field")


def find_start(file: int, record: Record, num_bytes: int) -> int:
    """The file offset of the bytes of a record, which end within the file.

    Raises:
        ValueError: They do not, or the directory points to something else.
    """
    header = os.pread(file, LOCAL_HEADER.size, min(record.header, num_bytes))
    if len(header) != LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError("is damaged: its zip directory points nowhere")
    len_name, len_extra = LOCAL_HEADER.unpack(header)[-2:]
    start = record.header + LOCAL_HEADER.size + int(len_name) + int(len_extra)
    if start + record.num_bytes > num_bytes:
        raise ValueError("is truncated")
    return start


def compute_crc(file: int, start: int, num_bytes: int) -> int:
    """CRC-32 of bytes of a file."""
    crc, end = 0, start + num_bytes
    while start < end:
        data = os.pread(file, min(BUFFER_BYTES, end - start), start)
        if not data:
            break
        crc = zlib.crc32(data, crc)
        start += len(data)
    return crc


class RecordWriter:
    """Writes an archive record by record; it is invalid before `finish`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file.fileno()
        self._end = 0
        self._directory = bytearray()
        self._num_records = 0

    def add(self, name: str, parts: Iterable[bytes | memoryview]) -> int:
        """Write a record; returns its size in bytes."""
        start = self._find_start(name)
        crc, at = 0, start
        for part in parts:
            crc = zlib.crc32(part, crc)
            write_at(self._file, part, at)
            at += len(part)
        self._enter(name, start, at - start, crc)
        return at - start

    def copy(self, name: str, source: int, start: int, num_bytes: int, *, crc: int) -> None:
        """Write a record with bytes of another file, whose CRC-32 is known.

        Raises:
            EOFError: The other file ends before them.
        """
        at = self._find_start(name)
        copy_range(source, start, self._file, at, num_bytes)
        self._enter(name, at, num_bytes, crc)

    def finish(self) -> None:
        """Write the directory."""
        start, size, count = self._end, len(self._directory), self._num_records
        end, place = b"", start
        if start > LARGEST:
            place = WIDER
            end += ZIP64_END.pack(b"PK\6\6", ZIP64_END.size - 12, count, count, size, start)
            end += ZIP64_LOCATOR.pack(b"PK\6\7", start + size, 1)
        end += END.pack(b"PK\5\6", count, count, size, place)
        write_at(self._file, bytes(self._directory) + end, start)

    def _find_start(self, name: str) -> int:
        """The file offset of the next record's bytes: after its header, aligned."""
        smallest = LOCAL_HEADER.size + len(name.encode()) + EXTRA.size + 16 + EXTRA.size
        return -(-(self._end + smallest) // ALIGNMENT) * ALIGNMENT

    def _enter(self, name: str, start: int, num_bytes: int, crc: int) -> None:
        """Write the header of a record after its bytes, and add it to the directory."""
        header, path = self._end, name.encode()
        # The header has the same length for all sizes, so that it can be written after the bytes.
        extra = EXTRA.pack(ZIP64, 16) + struct.pack("<2Q", num_bytes, num_bytes)
        room = start - header - LOCAL_HEADER.size - len(path) - len(extra) - EXTRA.size
        extra += EXTRA.pack(PADDING, room) + bytes(room)
        local = LOCAL_HEADER.pack(
            b"PK\3\4", NAMES_ARE_UTF8, 0, crc, WIDER, WIDER, len(path), len(extra)
        )
        write_at(self._file, local + path + extra, header)
        size, place, extra = num_bytes, header, b""
        if max(num_bytes, header) > LARGEST:
            extra = EXTRA.pack(ZIP64, 24) + struct.pack("<3Q", num_bytes, num_bytes, header)
            size = place = WIDER
        entry = ENTRY.pack(
            b"PK\1\2", NAMES_ARE_UTF8, 0, crc, size, size, len(path), len(extra), 0, place
        )
        self._directory += entry + path + extra
        self._num_records += 1
        self._end = start + num_bytes
