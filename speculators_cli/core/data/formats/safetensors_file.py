"""A `.safetensors` file as a directory of tensors, which are read on use.

The format: eight bytes with the length of a JSON object, the object, then the bytes of all tensors
without gaps. The safetensors library memory-maps files, which crashes if a file shrinks.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import BadSampleError, refusing_sample
from speculators_cli.core.data.stored import StoredStates
from speculators_cli.core.files import open_regular
from speculators_cli.core.reading import UnreadableError, check_content
from speculators_cli.core.torch_file.open_file import OpenFile, TensorFile
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 4 * 2**20  # of a sample: three tensors, some metadata
METADATA = "__metadata__"
DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "U8": "uint8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as described in the header."""

    kind: str  # its dtype, as in the header
    shape: tuple[int, ...]
    start: int  # offset of its bytes in the file
    end: int

    @property
    def dtype(self) -> str:
        """Its dtype in torch, a key of `ITEM_BYTES`; empty if torch does not have it."""
        return DTYPES.get(self.kind, "")


class SafetensorsFile(TensorFile):
    """An open `.safetensors` file, with its header read and checked.

    Raises:
        BadSampleError: It is not a safetensors file, or truncated.
        OSError: It cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(OpenFile(open_regular(file), file))
        try:
            self.tensors = _read_header(self.source)
        except (ValueError, TypeError, LookupError, RecursionError, struct.error) as error:
            self.source.close()
            raise BadSampleError(f"is not a safetensors file: {_explain(file, error)}") from None

    @refusing_sample()
    def read(self, name: str) -> NDArray[Any]:
        """Read a tensor of a NumPy dtype into memory."""
        tensor = self.tensors[name]
        data = self.source.read(tensor.start, tensor.end - tensor.start)
        if len(data) != tensor.end - tensor.start:
            raise BadSampleError("is truncated")
        return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)

    def states(self, name: str, layer: int) -> StoredStates:
        """Return one layer of a tensor [seq_len, layers, hidden], to be read on use."""
        tensor = self.tensors[name]
        rows, num_layers, width = tensor.shape
        start = tensor.start + layer * width * ITEM_BYTES[tensor.dtype]
        shape, stride = (rows, width), (num_layers * width, 1)
        return StoredStates(self.lend(), tensor.dtype, start, shape, stride)


def _explain(file: Path, error: Exception) -> str:
    """Describe what is in the file instead of a safetensors file, or what is damaged in it."""
    try:
        check_content(file)
    except UnreadableError as unreadable:
        hint = unreadable.hint
        return f"it {unreadable.reason}: {hint[0].lower()}{hint[1:]}"
    return str(error)


def _read_header(source: OpenFile) -> dict[str, StoredTensor]:
    (num_bytes,) = LENGTH.unpack(source.read(0, LENGTH.size))
    first = LENGTH.size + num_bytes
    if num_bytes > MAX_HEADER_BYTES or first > source.num_bytes:
        raise ValueError("its header is too large")
    header = json.loads(source.read(LENGTH.size, num_bytes))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    header.pop(METADATA, None)
    tensors = {name: _read_tensor(entry, first) for name, entry in header.items()}
    end = first
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = tensor.end
    if end != source.num_bytes:
        raise ValueError(f"it has {source.num_bytes:,} bytes, but its header describes {end:,}")
    return tensors


def _read_tensor(entry: Any, first: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape, kind = entry["shape"], entry["dtype"]
    if not all(type(size) is int and 0 <= size < 2**63 for size in (*shape, start, end)):
        raise ValueError("its header has an invalid size")
    item_bytes = ITEM_BYTES.get(DTYPES.get(kind, ""))
    if end < start or (item_bytes is not None and prod(shape) * item_bytes != end - start):
        raise ValueError("a tensor in its header has another size than its data")
    return StoredTensor(str(kind), tuple(shape), first + start, first + end)
