"""Writing a safetensors file from memory, and its checksum with it.

The bytes are those of the safetensors library, whose older versions hold Python's global lock
while they write: training would stop for as long. Here every write and every update of the
checksum releases it.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.drafts.checkpoint_reader import FileRecord
from speculators_cli.core.files import sync

BLOCK_BYTES = 2**24  # hashed and written at once
ALIGNMENT = 8  # of the header's length
# Names of the format, in its order: the widest types first.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors on the CPU to a new file, and flush it to disk.

    Args:
        tensors: Contiguous; not changed until this returns.
        file: Does not exist yet.
        metadata: Texts in the header.

    Returns:
        Size and checksum of what was written, from memory.

    Raises:
        OSError: The disk is full or fails.
    """
    digest, num_bytes = sha256(), 0
    with file.open("xb", buffering=0) as stream:
        for block in _blocks(tensors, metadata):
            digest.update(block)
            num_bytes += len(block)
            while len(block):
                block = block[stream.write(block) :]
    sync(file)
    return FileRecord(num_bytes=num_bytes, sha256=digest.hexdigest())


def _blocks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    """The bytes of the file, in order."""
    kinds = list(DTYPES)
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    yield memoryview(_header([(name, tensors[name]) for name in names], metadata))
    for name in names:
        assert tensors[name].is_contiguous(), "the view below needs it"
        content = tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]


def _header(named: list[tuple[str, Tensor]], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON of names, types, shapes and places."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in named:
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
