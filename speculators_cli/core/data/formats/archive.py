"""A `.pt` file as a directory of tensors: described first, mapped into memory only when wanted."""

import mmap
import os
import struct
import zipfile
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
            self._entries: dict[str, zipfile.ZipInfo] = {}
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

    def check(self, spec: TensorSpec) -> None:
        """Check that the file holds as many bytes for a tensor as it claims.

        Raises:
            BadSampleError: It does not.
        """
        entry = self._entries.get(spec.storage_key)
        if entry is None:
            raise BadSampleError("is damaged: the data of a tensor is missing")
        if (spec.offset + spec.span) * spec.dtype.itemsize > entry.file_size:
            raise BadSampleError(
                f"holds a tensor of {spec.num_bytes:,} bytes with {entry.file_size:,} of data"
            )

    def read(self, spec: TensorSpec) -> Tensor:
        """Read a tensor into memory."""
        num_bytes = spec.span * spec.dtype.itemsize
        start = self._locate(spec)
        data = bytearray(os.pread(self._file.fileno(), num_bytes, start))
        if len(data) != num_bytes:
            raise BadSampleError("is truncated")
        return _view(data, spec, 0)

    def map(self, specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
        """Map tensors into memory: their bytes are read when they are used, and never written."""
        starts = [self._locate(spec) for spec in specs]
        mapping = mmap.mmap(self._file.fileno(), self.num_bytes, access=mmap.ACCESS_COPY)
        return tuple(_view(mapping, spec, start) for spec, start in zip(specs, starts, strict=True))

    def _read_directory(self) -> object:
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error):
            raise BadSampleError(self._describe_foreign_file()) from None
        if any(entry.file_size != entry.compress_size for entry in entries.values()):
            raise BadSampleError("is compressed; samples are stored as they are")
        name = next((name for name in entries if name.endswith("/data.pkl")), None)
        if name is None:
            raise BadSampleError("is a zip archive that `torch.save` did not write")
        prefix = name.removesuffix("data.pkl")
        byte_order = entries.get(f"{prefix}byteorder")
        if byte_order is not None and self._read_entry(byte_order) != b"little":
            raise BadSampleError("was written on a big-endian machine")
        self._entries = {
            path.removeprefix(f"{prefix}data/"): entry
            for path, entry in entries.items()
            if path.startswith(f"{prefix}data/")
        }
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

    def _read_entry(self, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > MAX_STRUCTURE_BYTES:
            raise BadSampleError("holds too much beside its tensors to be a sample")
        return os.pread(self._file.fileno(), entry.file_size, self._find_start(entry))

    def _find_start(self, entry: zipfile.ZipInfo) -> int:
        header = os.pread(self._file.fileno(), LOCAL_HEADER.size, entry.header_offset)
        if len(header) != LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise BadSampleError("is damaged: its zip directory points nowhere")
        _, len_name, len_extra = LOCAL_HEADER.unpack(header)
        start: int = entry.header_offset + LOCAL_HEADER.size + len_name + len_extra
        if start + entry.file_size > self.num_bytes:
            raise BadSampleError("is truncated")
        return start

    def _locate(self, spec: TensorSpec) -> int:
        self.check(spec)
        start = self._find_start(self._entries[spec.storage_key])
        return start + spec.offset * spec.dtype.itemsize


def _view(buffer: bytearray | mmap.mmap, spec: TensorSpec, start: int) -> Tensor:
    if spec.num_elements == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat = torch.frombuffer(buffer, dtype=spec.dtype, count=spec.span, offset=start)
    return flat.as_strided(spec.shape, spec.stride)
