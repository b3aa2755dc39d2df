"""The input of `generate-data`: files, a folder, or a data set of the hub; read row by row."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

from speculators_cli.core.conversations.bad_rows import BadRow, BadRows
from speculators_cli.core.conversations.hub_prompts import HubPrompts
from speculators_cli.core.conversations.json_rows import Decode, Rows, read_json_rows
from speculators_cli.core.conversations.prompts import BadRowError, Source, parse_row
from speculators_cli.core.conversations.table_rows import BATCH_ROWS, TableRows
from speculators_cli.core.errors import DataError, MachineError, SettingsError
from speculators_cli.core.files import open_regular, read_parts
from speculators_cli.core.reading import (
    DOWNLOAD_AGAIN,
    UnreadableError,
    check_content,
    first_line,
    opening,
    refusing,
)


class Prompts(Protocol):
    """Rows of an input, in an order that does not change."""

    @property
    def name(self) -> str:
        """The argument, for messages and records."""

    def fingerprint(self) -> str:
        """Return what changes with the rows or their order, but not with the input's place."""

    def count_rows(self) -> int:
        """Return the number of rows, including bad ones."""

    def iterate(self, start: int) -> Rows:
        """Yield the place of each row from `start` on, and a function that decodes it."""


def open_prompts(name_or_path: str, *, split: str | None = None) -> Prompts:
    """Open an input without reading rows.

    Args:
        name_or_path: A JSON or Parquet file, a folder of them, or a data set of the hub.
        split: Split of the data set.

    Raises:
        SettingsError: Neither a path nor the name of a data set.
        DataError: A folder without files that can be read.
        MachineError: A package is missing, or the hub is unreachable.
    """
    path = Path(name_or_path)
    if not os.path.lexists(path):
        return HubPrompts(name_or_path, split=split)
    if split is not None:
        raise SettingsError(
            f"`{name_or_path}` is a local path, which has no splits",
            hint="Pass the file of the split, without `--split`",
        )
    return FilePrompts(path)


def read_prompts(
    prompts: Prompts,
    bad: BadRows,
    *,
    start: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Source]:
    """Yield the usable rows; bad ones are counted and listed in `bad`.

    Args:
        prompts: The input.
        bad: Updated; checked after the last row of the input.
        start: First row.
        stop: Row to stop before.
        vocab_size: Upper limit of given token ids.

    Raises:
        DataError: A file cannot be read, or too many rows are bad.
    """
    index = start
    with closing(prompts.iterate(start)) as rows:
        for place, decode in rows:
            if stop is not None and index >= stop:
                return
            found = read_row(place, decode, index, vocab_size=vocab_size)
            if isinstance(found, BadRow):
                bad.add(found)
            else:
                bad.add_good()
                yield found
            index += 1
    if index == 0:
        raise DataError(f"`{prompts.name}` has no rows", hint="Pass a file with prompts")
    bad.check()


def read_row(place: str, decode: Decode, index: int, *, vocab_size: int | None) -> Source | BadRow:
    """Decode and parse one row of an input, or say why it cannot be used."""
    try:
        return parse_row(decode(), index, vocab_size=vocab_size)
    except BadRowError as error:
        return BadRow(place, str(error))


class FilePrompts:
    """Rows of a file, or of all files below a folder, sorted by path.

    Args:
        path: An existing path.

    Raises:
        DataError: A folder without files that can be read.
        SettingsError: A file of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _find_files(path)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def fingerprint(self) -> str:
        """Hash relative paths, sizes, and parts of the contents."""
        digest = hashlib.sha256()
        for file in self.files:
            with refusing(DataError), opening(file) as descriptor:
                num_bytes = os.fstat(descriptor).st_size
                digest.update(f"{self._relative(file)}\0{num_bytes}\0".encode())
                digest.update(read_parts(descriptor))
        return digest.hexdigest()

    def count_rows(self) -> int:
        """Count without decoding."""
        return sum(1 for _ in self.iterate(0))

    def iterate(self, start: int) -> Rows:
        """Yield rows; those before `start` are not decoded."""
        num_skipped = 0
        for file in self.files:
            with refusing(DataError), closing(READERS[file.suffix.lower()](file)) as rows:
                for place, decode in rows:
                    if num_skipped < start:
                        num_skipped += 1
                        continue
                    yield f"{file}, {place}", decode

    def _relative(self, file: Path) -> str:
        # A single file may be renamed, but its format is by its suffix.
        return file.suffix if file == self.path else file.relative_to(self.path).as_posix()


def _find_files(path: Path) -> tuple[Path, ...]:
    known = ", ".join(f"`{suffix}`" for suffix in READERS)
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise SettingsError(f"`{path}` is not one of {known}", hint="Convert it to JSON lines")
        return (path,)
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READERS and not _is_hidden(file.relative_to(path))
    )
    files = tuple(file for file in found if not file.is_dir())
    if not files:
        raise DataError(f"`{path}` has no files of {known}", hint="Pass the folder of the prompts")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_parquet(file: Path) -> Rows:
    """Yield the rows of a Parquet file, decoded in batches.

    Raises:
        UnreadableError: It is damaged.
        MachineError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MachineError(
            f"`{file}` is a Parquet file, and pyarrow is not installed",
            hint="Run `pip install 'speculators-cli[arrow]'`",
        ) from None
    check_content(file)
    number = 0
    try:
        with open_regular(file) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS):
                rows = TableRows(batch.to_pylist)
                for at in range(batch.num_rows):
                    number += 1
                    yield f"row {number:,}", partial(rows.row, at)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"cannot be read after row {number:,}: {first_line(error)}"
        raise UnreadableError(file, reason, hint=DOWNLOAD_AGAIN) from None


Reader = Callable[[Path], Rows]
READERS: Mapping[str, Reader] = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".parquet": _read_parquet,
}
