"""The Arrow table of ids and masks, as saved by `datasets`, read into NumPy arrays.

pyarrow does not validate its input: a damaged offset, or a wrong length in a header, crashes the
process. So the frame of each message is checked before pyarrow reads it, and each column before
its values are read. Nothing is memory-mapped, and compressed data is rejected.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import BadSampleError
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import open_regular
from speculators_cli.core.reading import check_content, read_json_object
from speculators_cli.core.torch_file.open_file import OpenFile

STATE_FILE = "state.json"  # of a table: lists its files
IDS, MASK = "input_ids", "loss_mask"
NO_ID, NO_MASK = -1, 2  # for missing or invalid ids, and for missing or invalid mask values
MAX_STATE_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 16 * 2**20  # of one message
MAX_PART_BYTES = 2 * 2**30  # `datasets` writes a thousand rows per message

# Fields of the flatbuffers at the beginning of a message (Message.fbs).
HEADER_TYPE, HEADER, BODY_LENGTH = 1, 2, 3  # of a message
COMPRESSION = 3  # of a record batch
RECORD_BATCH = 3  # a message type
INT32, INT64, UINT16, UINT32 = (struct.Struct(f"<{form}") for form in "iqHI")
CONTINUATION = -1  # before the length of a message, since Arrow 0.15


@dataclass(frozen=True)
class Lists:
    """A column of lists: the concatenated values of all rows."""

    values: NDArray[Any]
    starts: NDArray[np.int64]  # [rows + 1]

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class TokenTable:
    """Ids and masks of samples by row."""

    input_ids: Lists  # int32; `NO_ID` if missing
    loss_mask: Lists  # uint8: 0, 1, or `NO_MASK`

    @property
    def num_rows(self) -> int:
        """Number of rows of the table."""
        return len(self.input_ids.starts) - 1


def read_table(folder: Path) -> TokenTable:
    """Read the table in a folder.

    Raises:
        BadSampleError: It is damaged, or not a table of ids and masks.
        MachineError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ModuleNotFoundError:
        raise MachineError(
            f"The loss masks in `{folder}` are in an Arrow table, and pyarrow is not installed",
            hint="Run `pip install 'speculators-cli[arrow]'`",
        ) from None
    expected = (OSError, ValueError, LookupError, TypeError, struct.error, MemoryError)
    try:
        parts = [part for file in _list_files(folder) for part in _read_parts(file)]
    except (*expected, RecursionError, pa.ArrowException) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = next(iter(text.strip().splitlines()), repr(error))
        raise BadSampleError(f"has an Arrow table that cannot be read: {reason}") from None
    return TokenTable(
        _join([ids for ids, _ in parts], np.int32), _join([mask for _, mask in parts], np.uint8)
    )


def _list_files(folder: Path) -> list[Path]:
    content = read_json_object(folder / STATE_FILE, max_bytes=MAX_STATE_BYTES)
    # Only names: a table's files are in one folder.
    names = [Path(entry["filename"]).name for entry in content["_data_files"]]
    if len(set(names)) != len(names):
        raise ValueError(f"`{STATE_FILE}` lists a file twice")
    return [folder / name for name in names]


def _read_parts(file: Path) -> Iterator[tuple[Lists, Lists]]:
    """Read ids and masks of each record batch of a file."""
    import pyarrow as pa

    check_content(file)
    with open_regular(file) as stream:
        source = OpenFile(stream, file)  # closes the stream when collected, so keep a reference
        _check_frame(source)
        schema = pa.ipc.open_stream(pa.PythonFile(stream, mode="r")).schema
        columns = [schema.get_all_field_indices(name) for name in (IDS, MASK)]
        if [len(found) for found in columns] != [1, 1]:
            raise ValueError(f"not one column `{IDS}` and one `{MASK}`")
        stream.seek(0)
        options = pa.ipc.IpcReadOptions(
            included_fields=[found[0] for found in columns], use_threads=False
        )
        reader = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"), options=options)
        for batch in reader:
            ids, mask = batch.column(IDS), batch.column(MASK)
            yield _read_lists(ids, _to_ids), _read_lists(mask, _to_mask)


def _check_frame(file: OpenFile) -> None:
    """Check that the messages of a file lie within it, and are not compressed."""
    at = 0
    while at < file.num_bytes:
        (num_bytes,) = INT32.unpack(file.read(at, INT32.size))
        at += INT32.size
        if num_bytes == CONTINUATION:
            (num_bytes,) = INT32.unpack(file.read(at, INT32.size))
            at += INT32.size
        if num_bytes == 0:
            return
        if not 0 < num_bytes <= min(MAX_METADATA_BYTES, file.num_bytes - at):
            raise ValueError("it is truncated or damaged")
        message = file.read(at, num_bytes)
        body_bytes = _check_message(message)
        at += num_bytes + body_bytes
        if not 0 <= body_bytes <= MAX_PART_BYTES or at > file.num_bytes:
            raise ValueError("it is truncated or damaged")


def _check_message(message: bytes) -> int:
    """Check that a message is not compressed; return the number of bytes of its values."""
    (root,) = UINT32.unpack_from(message, 0)
    kind, header, length = (
        _find_field(message, root, field) for field in (HEADER_TYPE, HEADER, BODY_LENGTH)
    )
    if kind and header and message[kind] == RECORD_BATCH:
        batch = header + UINT32.unpack_from(message, header)[0]
        if _find_field(message, batch, COMPRESSION):
            raise ValueError("it is compressed, unlike tables of `datasets`")
    return int(INT64.unpack_from(message, length)[0]) if length else 0


def _find_field(buffer: bytes, table: int, field: int) -> int:
    """Return the offset of a field in a flatbuffers table; 0 if it is missing."""
    entries = table - INT32.unpack_from(buffer, table)[0]
    if not 0 <= entries < len(buffer):
        raise ValueError("it is damaged")
    (num_bytes,) = UINT16.unpack_from(buffer, entries)
    place = 4 + 2 * field
    offset = UINT16.unpack_from(buffer, entries + place)[0] if place < num_bytes else 0
    return table + int(offset) if offset else 0


def _read_lists(column: Any, convert: Any) -> Lists:
    """Read a column of one record batch, which is checked before its values are read."""
    import pyarrow as pa

    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        raise ValueError(f"a column of {column.type}, expected lists")
    column.validate(full=True)
    starts = column.offsets.to_numpy().astype(np.int64)
    first, end = (int(starts[0]), int(starts[-1])) if len(starts) else (0, 0)
    values = convert(column.values.slice(first, end - first))
    starts = starts - first if len(starts) else np.zeros(1, np.int64)
    for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)):
        values[starts[row] : starts[row + 1]] = NO_MASK if values.dtype == np.uint8 else NO_ID
    return Lists(values, starts)


def _to_ids(values: Any) -> NDArray[np.int32]:
    import pyarrow as pa

    if not pa.types.is_integer(values.type):
        raise ValueError(f"`{IDS}` of {values.type}")
    numbers = values.to_numpy(zero_copy_only=False)
    is_id = (numbers >= 0) & (numbers < 2**31)
    return np.where(is_id, numbers, NO_ID).astype(np.int32)


def _to_mask(values: Any) -> NDArray[np.uint8]:
    import pyarrow as pa

    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)
    if not any(is_kind(values.type) for is_kind in kinds):
        raise ValueError(f"`{MASK}` of {values.type}")
    numbers = values.to_numpy(zero_copy_only=False)
    return np.select([numbers == 1, numbers == 0], [1, 0], NO_MASK).astype(np.uint8)


def _join(parts: list[Lists], dtype: type[np.generic]) -> Lists:
    """Concatenate the rows of all batches."""
    starts, end = [np.zeros(1, np.int64)], 0
    for part in parts:
        starts.append(part.starts[1:] + end)
        end += len(part.values)
    values = np.concatenate([np.empty(0, dtype), *(part.values for part in parts)])
    return Lists(values, np.concatenate(starts))
