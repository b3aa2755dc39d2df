"""Writing a safetensors file from memory, and its checksum with it.

The bytes are those of the safetensors library, whose older versions hold Python's global lock
while they write: training would stop for as long. Here every write and every update of the
checksum releases it.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.drafts.checkpoint_reader import FileRecord

BLOCK_BYTES = 2**24  # hashed and written at once
FLUSH_SECONDS = 0.1  # between flushes of a file that is being written
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
    header, views = _header(tensors, metadata), _views(tensors)
    is_written = threading.Event()
    # The disk and the checksum take about as long as each other.
    with ThreadPoolExecutor(2) as threads:
        digest = threads.submit(_hash, header, views)
        with file.open("xb", buffering=0) as stream:
            flushed = threads.submit(_flush, stream.fileno(), is_written)
            try:
                for block in _blocks(header, views):
                    part = block
                    while len(part):
                        part = part[stream.write(part) :]
            finally:
                is_written.set()
                flushed.result()
            os.fsync(stream.fileno())
        num_bytes = len(header) + sum(map(len, views))
        return FileRecord(num_bytes=num_bytes, sha256=digest.result())


def _flush(file: int, is_written: threading.Event) -> None:
    """Flush a file again and again while it is written: the system would start at its end.

    An error of the disk is reported to one flush only, so it must not be lost here.
    """
    while not is_written.wait(FLUSH_SECONDS):
        os.fsync(file)


def _hash(header: bytes, views: list[memoryview]) -> str:
    digest = sha256()
    for block in _blocks(header, views):
        digest.update(block)
    return digest.hexdigest()


def _blocks(header: bytes, views: list[memoryview]) -> Iterator[memoryview]:
    """The bytes of the file, in order."""
    for view in (memoryview(header), *views):
        for start in range(0, len(view), BLOCK_BYTES):
            yield view[start : start + BLOCK_BYTES]


def _views(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The bytes of each tensor, in the order of the file."""
    ordered = [tensors[name] for name in _order(tensors)]
    assert all(tensor.is_contiguous() for tensor in ordered), "else there are copies"
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for tensor in ordered]


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    kinds = list(DTYPES)
    return sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON of names, types, shapes and places."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in _order(tensors):
        tensor = tensors[name]
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
