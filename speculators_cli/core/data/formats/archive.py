"""A `.pt` file as a directory of tensors: described first, mapped into memory only when wanted."""

import mmap
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from speculators_cli.core.data.formats.structure import TensorSpec, read_structure
from speculators_cli.core.data.sample import BadSampleError

MAX_STRUCTURE_BYTES = 64 * 2**20
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extras
FIRST_BYTES = {
    b"<": "is a web page, not a sample",
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\x80": "is a pickle outside a zip archive, as torch wrote them before 1.6",
}


@dataclass(frozen=True)
class _Block:
    """Where the bytes of a storage lie in the file."""

    offset: int
    num_bytes: int


class Archive:
    """An open `.pt` file: what it says it holds (`content`), and access to its tensors.

    Only the directory has been read. `content` holds a `TensorSpec` in place of each tensor.

    Raises:
        BadSampleError: The file is not a whole archive of plain tensors and plain values.
    """

    content: object

    def __init__(self, file: Path) -> None:
        self._file: BinaryIO = file.open("rb")
        try:
            self.num_bytes = os.fstat(self._file.fileno()).st_size
            self._blocks: dict[str, _Block] = {}
            self.content = self._read_directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, spec: TensorSpec) -> Tensor:
        """Read a tensor into memory."""
        start, num_bytes = self._locate(spec)
        data = bytearray(os.pread(self._file.fileno(), num_bytes, start))
        if len(data) != num_bytes:
            raise BadSampleError("is truncated")
        return _view(data, spec, 0)

    def map(self, specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
        """Map tensors into memory: their bytes are read when they are used, and never written."""
        starts = [self._locate(spec)[0] for spec in specs]
        mapping = mmap.mmap(self._file.fileno(), self.num_bytes, access=mmap.ACCESS_COPY)
        return tuple(_view(mapping, spec, start) for spec, start in zip(specs, starts, strict=True))

    def _read_directory(self) -> object:
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error):
            raise BadSampleError(self._describe_foreign_file()) from None
        name = next((name for name in entries if name.endswith("/data.pkl")), None)
        if name is None:
            raise BadSampleError("is a zip archive that `torch.save` did not write")
        prefix = name.removesuffix("data.pkl")
        byte_order = entries.get(f"{prefix}byteorder")
        if byte_order is not None and self._read_entry(byte_order) != b"little":
            raise BadSampleError("was written on a big-endian machine")
        for entry in entries.values():
            if entry.filename.startswith(f"{prefix}data/"):
                key = entry.filename.removeprefix(f"{prefix}data/")
                self._blocks[key] = self._find_block(entry)
        return read_structure(self._read_entry(entries[name]))

    def _describe_foreign_file(self) -> str:
        if self.num_bytes == 0:
            return "is empty (0 bytes)"
        start = os.pread(self._file.fileno(), 64, 0)
        if start.startswith(b"PK"):
            return "is truncated or damaged: the end of its zip archive is missing"
        for first_bytes, reason in FIRST_BYTES.items():
            if start.lstrip().startswith(first_bytes):
                return reason
        return "is not a file that `torch.save` writes"

    def _find_block(self, entry: zipfile.ZipInfo) -> _Block:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise BadSampleError("is compressed; samples are stored as they are")
        header = os.pread(self._file.fileno(), LOCAL_HEADER.size, entry.header_offset)
        if len(header) != LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise BadSampleError("is damaged: its zip directory points nowhere")
        _, len_name, len_extra = LOCAL_HEADER.unpack(header)
        offset = entry.header_offset + LOCAL_HEADER.size + len_name + len_extra
        if offset + entry.file_size > self.num_bytes:
            raise BadSampleError("is truncated")
        return _Block(offset, entry.file_size)

    def _read_entry(self, entry: zipfile.ZipInfo) -> bytes:
        block = self._find_block(entry)
        if block.num_bytes > MAX_STRUCTURE_BYTES:
            raise BadSampleError("holds too much beside its tensors to be a sample")
        return os.pread(self._file.fileno(), block.num_bytes, block.offset)

    def _locate(self, spec: TensorSpec) -> tuple[int, int]:
        """Where a tensor starts in the file, and the bytes from its first element to its last."""
        block = self._blocks.get(spec.storage_key)
        if block is None:
            raise BadSampleError("is damaged: the data of a tensor is missing")
        start, num_bytes = spec.offset * spec.dtype.itemsize, spec.span * spec.dtype.itemsize
        claimed = spec.num_elements * spec.dtype.itemsize
        if max(start + num_bytes, claimed) > block.num_bytes:
            raise BadSampleError(
                f"holds a tensor of {claimed:,} bytes with {block.num_bytes:,} bytes of data"
            )
        return block.offset + start, num_bytes


def _view(buffer: bytearray | mmap.mmap, spec: TensorSpec, start: int) -> Tensor:
    if spec.num_elements == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat = torch.frombuffer(buffer, dtype=spec.dtype, count=spec.span, offset=start)
    return flat.as_strided(spec.shape, spec.stride)
