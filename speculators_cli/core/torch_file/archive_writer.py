"""Write a `.pt` file that `torch.load` and `Archive` read, from bytes and from other files."""

import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

from speculators_cli.core.torch_file.archive import ORIGIN_NAME, Archive
from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.structure import STORAGE_DTYPES, UNTYPED_DTYPES
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES, TensorSpec
from speculators_cli.core.torch_file.zip_records import RecordWriter

PREFIX = "archive/"  # torch requires one, with any name
STORAGE_NAMES = {dtype: name for name, dtype in reversed(STORAGE_DTYPES.items())}
DTYPE_NAMES = {dtype: name for name, dtype in UNTYPED_DTYPES.items()}
UNTYPED_STORAGE = "torch.storage.UntypedStorage"


class ArchiveWriter:
    """Writes the bytes of tensors first, then the content: plain values and `TensorSpec`.

    A file is a zip archive: `data/0`, `data/1`, ... are the storages of tensors, and `data.pkl` is
    a pickle that rebuilds tensors from them. Here it comes last, beside the directory, so that
    reading what a file holds reads its end and nothing else.

    Args:
        file: Opened for writing.
        origin: What the tensors were computed from, kept in a record that `torch.load` ignores.
    """

    def __init__(self, file: BinaryIO, *, origin: str | None = None) -> None:
        self._origin = origin
        self._records = RecordWriter(file)
        self._storage_bytes: dict[str, int] = {}
        self._copied: dict[tuple[Archive, str], str] = {}

    def add(
        self, parts: Iterable[bytes | memoryview], dtype: str, shape: Sequence[int]
    ) -> TensorSpec:
        """Write the elements of a tensor, row by row, in any number of parts."""
        key = str(len(self._storage_bytes))
        self._storage_bytes[key] = self._records.add(f"{PREFIX}data/{key}", parts)
        stride = [1]
        for size in reversed(shape[1:]):
            stride.append(stride[-1] * size)
        spec = TensorSpec(key, dtype, 0, tuple(shape), tuple(reversed(stride[: len(shape)])))
        assert spec.num_bytes == self._storage_bytes[key], "the parts are the whole tensor"
        return spec

    def copy(self, source: Archive, spec: TensorSpec) -> TensorSpec:
        """Copy a tensor with its whole storage, each storage once.

        Their checksum is the source's: it is not computed, so bytes that were damaged there are
        known to be damaged here.

        Raises:
            TorchFileError: The source is damaged.
        """
        if (source, spec.storage_key) not in self._copied:
            key = self._copied[source, spec.storage_key] = str(len(self._storage_bytes))
            start, record = source.find_storage(spec)
            try:
                self._records.copy(
                    f"{PREFIX}data/{key}", source.file, start, record.num_bytes, crc=record.crc
                )
            except EOFError:
                raise TorchFileError("is truncated") from None
            self._storage_bytes[key] = record.num_bytes
        key = self._copied[source, spec.storage_key]
        return TensorSpec(key, spec.dtype, spec.offset, spec.shape, spec.stride)

    def finish(self, content: object) -> None:
        """Write the content of the file."""
        pickled = write_structure(content, self._storage_bytes)
        if self._origin is not None:
            self._records.add(PREFIX + ORIGIN_NAME, [self._origin.encode()])
        for name, data in (("byteorder", b"little"), ("version", b"3\n"), ("data.pkl", pickled)):
            self._records.add(PREFIX + name, [data])
        self._records.finish()


def write_structure(content: object, storage_bytes: Mapping[str, int]) -> bytes:
    """The pickle that `read_structure` reads as `content`, and `torch.load` as its tensors.

    Args:
        content: Dicts with text as keys, lists, text, numbers, truth values, None, `TensorSpec`.
        storage_bytes: Size of each storage that a tensor is in.
    """
    return pickle.PROTO + b"\2" + b"".join(_pickle(content, storage_bytes)) + pickle.STOP


def _pickle(value: object, storage_bytes: Mapping[str, int]) -> Iterator[bytes]:
    if isinstance(value, TensorSpec):
        yield from _pickle_tensor(value, storage_bytes[value.storage_key])
    elif isinstance(value, dict):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, item in value.items():
            yield from _pickle(key, storage_bytes)
            yield from _pickle(item, storage_bytes)
        yield pickle.SETITEMS
    elif isinstance(value, list):
        yield pickle.EMPTY_LIST + pickle.MARK
        for item in value:
            yield from _pickle(item, storage_bytes)
        yield pickle.APPENDS
    elif isinstance(value, str):
        text = value.encode(errors="surrogatepass")
        yield pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    else:
        assert value is None or isinstance(value, int | float), "a plain value"
        # Without the protocol and stop operations.
        yield pickle.dumps(value, 2)[2:-1]


def _pickle_tensor(spec: TensorSpec, num_bytes: int) -> Iterator[bytes]:
    # As torch does: without a storage class of their own, the storage is one of bytes.
    is_untyped = spec.dtype in DTYPE_NAMES
    storage_name = UNTYPED_STORAGE if is_untyped else STORAGE_NAMES[spec.dtype]
    num_elements = num_bytes if is_untyped else num_bytes // ITEM_BYTES[spec.dtype]
    yield _pickle_global(f"torch._utils._rebuild_tensor_v{3 if is_untyped else 2}") + pickle.MARK
    yield from (pickle.MARK, *_pickle("storage", {}), _pickle_global(storage_name))
    yield from (*_pickle(spec.storage_key, {}), *_pickle("cpu", {}), *_pickle(num_elements, {}))
    yield pickle.TUPLE + pickle.BINPERSID
    yield from _pickle(spec.offset, {})
    for sizes in (spec.shape, spec.stride):
        yield from (pickle.MARK, *(x for size in sizes for x in _pickle(size, {})), pickle.TUPLE)
    # It needs no gradient and has no hooks.
    yield pickle.NEWFALSE + pickle.NONE
    if is_untyped:
        yield _pickle_global(DTYPE_NAMES[spec.dtype])
    yield pickle.TUPLE + pickle.REDUCE


def _pickle_global(name: str) -> bytes:
    module, attribute = name.rsplit(".", 1)
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()
