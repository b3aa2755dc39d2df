"""A `.pt` file as a directory of tensors, which are read on demand."""

import struct
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.files import open_regular, read_parts
from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.gzip_file import is_gzip, unpack
from speculators_cli.core.torch_file.open_file import OpenFile, TensorFile
from speculators_cli.core.torch_file.structure import read_structure
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES, TensorSpec
from speculators_cli.core.torch_file.zip_records import (
    Record,
    compute_crc,
    find_start,
    read_directory,
)

if TYPE_CHECKING:
    from torch import Tensor

ORIGIN_NAME = "origin"  # a record of this package
MAX_STRUCTURE_BYTES = 64 * 2**20
FIRST_BYTES = {
    b"<": "is a web page, not a sample",
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\x80": "is a pickle outside a zip archive, as torch wrote them before 1.6",
}


def _open(file: Path) -> BinaryIO:
    """Open a file; gzip files are decompressed into memory."""
    stream = open_regular(file)
    if not is_gzip(stream):
        return stream
    with stream:
        return unpack(stream)


class Archive(TensorFile):
    """An open `.pt` file: its `content`, and access to its tensors.

    Only the directory is read. `content` has a `TensorSpec` in place of each tensor.

    Raises:
        TorchFileError: The file is not a complete archive of plain tensors and values.
    """

    content: object

    def __init__(self, file: Path) -> None:
        super().__init__(OpenFile(_open(file), file))
        self.file, self.num_bytes = self.source.descriptor, self.source.num_bytes
        self._prefix = ""
        self._records: dict[str, Record] = {}
        try:
            self.content = self._read_directory()
        except BaseException:
            self.source.close()
            raise

    @property
    def fingerprint(self) -> str:
        """Changes with the contents: a hash of the checksums of all records.

        Without checksums in the archive, parts of the file are hashed.
        """
        own = f"{self._prefix}data"
        records = [
            (key, x.num_bytes, x.crc) for key, x in self._records.items() if key.startswith(own)
        ]
        digest = sha256(repr(records).encode())
        if not any(crc for _, _, crc in records):
            digest.update(read_parts(self.file))
        return digest.hexdigest()[:32]

    def check(self, spec: TensorSpec) -> None:
        """Check that the storage of a tensor is as large as its shape requires.

        Raises:
            TorchFileError: It is not.
        """
        record = self._find_record(spec)
        # Columns of a matrix without rows start beyond its end.
        end = (spec.offset + spec.span) * ITEM_BYTES[spec.dtype] if spec.num_elements else 0
        if end > record.num_bytes:
            raise TorchFileError(
                f"holds a tensor of {spec.num_bytes:,} bytes with {record.num_bytes:,} of data"
            )

    def read(self, spec: TensorSpec) -> NDArray[Any]:
        """Read a tensor of a type that NumPy has, or of bfloat16, into memory."""
        start, item_bytes = self.locate(spec), ITEM_BYTES[spec.dtype]
        data = self.source.read(start, spec.span * item_bytes)
        if len(data) != spec.span * item_bytes:
            raise TorchFileError("is truncated")
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        strides = [step * item_bytes for step in spec.stride] if spec.num_elements else None
        array: NDArray[Any] = np.ndarray(spec.shape, dtype, data, strides=strides)
        if spec.dtype == "bfloat16":
            # The upper half of a float32.
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def read_tensor(self, spec: TensorSpec) -> "Tensor":
        """Read a tensor of any type and shape into memory."""
        import torch

        flat = torch.empty(spec.span, dtype=getattr(torch, spec.dtype))
        if spec.span:
            self.source.fill(flat.view(torch.uint8).numpy(), self.locate(spec))
        return flat.as_strided(spec.shape, spec.stride)

    def locate(self, spec: TensorSpec) -> int:
        """The file offset of the first element of a tensor."""
        self.check(spec)
        start = self._find_start(self._find_record(spec))
        return start + spec.offset * ITEM_BYTES[spec.dtype]

    def find_storage(self, spec: TensorSpec) -> tuple[int, Record]:
        """The file offset and the record of a tensor's storage."""
        record = self._find_record(spec)
        return self._find_start(record), record

    def checksum(self, spec: TensorSpec) -> int:
        """CRC-32 of a tensor's storage: from the archive, or computed if it has none."""
        record = self._find_record(spec)
        return record.crc or self._compute_crc(record)

    def _compute_crc(self, record: Record) -> int:
        return compute_crc(self.file, self._find_start(record), record.num_bytes)

    @property
    def origin(self) -> str | None:
        """What its tensors were computed from, if recorded."""
        record = self._records.get(f"{self._prefix}{ORIGIN_NAME}")
        return None if record is None else self._read_record(record).decode(errors="replace")

    def verify(self, spec: TensorSpec | None = None) -> None:
        """Read every byte, or those of a tensor's storage, and compare with their checksums.

        Raises:
            TorchFileError: A checksum does not match.
        """
        key = "" if spec is None else f"{self._prefix}data/{spec.storage_key}"
        for name in [key] if key else self._records:
            record = self._records[name]
            # Zero if `torch.save` did not compute it.
            if record.crc and self._compute_crc(record) != record.crc:
                raise TorchFileError(f"has flipped bytes in `{name}`")

    def _read_directory(self) -> object:
        try:
            self._records = read_directory(self.file, self.num_bytes)
        except (ValueError, struct.error):
            raise TorchFileError(self._describe_foreign_file()) from None
        if not all(record.is_stored for record in self._records.values()):
            raise TorchFileError("is compressed; samples are stored as they are")
        if sum(record.num_bytes for record in self._records.values()) > self.num_bytes:
            raise TorchFileError("is damaged: the records of its zip archive overlap")
        name = next((name for name in self._records if name.endswith("/data.pkl")), None)
        if name is None:
            raise TorchFileError("is a zip archive that `torch.save` did not write")
        self._prefix = name.removesuffix("data.pkl")
        byte_order = self._records.get(f"{self._prefix}byteorder")
        if byte_order is not None and self._read_record(byte_order) != b"little":
            raise TorchFileError("was written on a big-endian machine")
        return read_structure(self._read_record(self._records[name]))

    def _describe_foreign_file(self) -> str:
        if self.num_bytes == 0:
            return "is empty (0 bytes)"
        start = self.source.read(0, 64)
        if start.startswith(b"PK"):
            return "is truncated or damaged: the end of its zip archive is missing"
        for first_bytes, reason in FIRST_BYTES.items():
            if start.lstrip().startswith(first_bytes):
                return reason
        return "is not a file that `torch.save` writes"

    def _find_record(self, spec: TensorSpec) -> Record:
        record = self._records.get(f"{self._prefix}data/{spec.storage_key}")
        if record is None:
            raise TorchFileError("is damaged: the data of a tensor is missing")
        return record

    def _read_record(self, record: Record) -> bytes:
        if record.num_bytes > MAX_STRUCTURE_BYTES:
            raise TorchFileError("holds too much beside its tensors to be a sample")
        return self.source.read(self._find_start(record), record.num_bytes)

    def _find_start(self, record: Record) -> int:
        try:
            return find_start(self.file, record, self.num_bytes)
        except ValueError as error:
            raise TorchFileError(str(error)) from None
