"""The index of a folder of samples: headers of an earlier scan, for unchanged files."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.sample import SampleHeader
from speculators_cli.core.files import replacing
from speculators_cli.core.reading import read_json_object
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES

MAX_INDEX_BYTES = 2**31  # some 500 per sample
INDEX_VERSION = 6


@dataclass(frozen=True)
class FileStamp:
    """Identifies the version of a file that was scanned."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int  # unlike the mtime, it cannot be set back
    beside: str  # stamps of other files that the sample is read from


@dataclass(frozen=True)
class Entry:
    """One sample on disk."""

    file: Path
    name: str  # path relative to the folder passed by the user
    stamp: FileStamp
    header: SampleHeader
    fingerprint: str  # of its contents


def read_index(file: Path, data_format: str, alignment: Alignment) -> dict[str, Entry]:
    """Read the entries of an earlier scan by path; empty if there are no usable ones."""
    try:
        content = read_json_object(file, max_bytes=MAX_INDEX_BYTES)
        kind = (content["index_version"], content["format"], content["shift"])
        if kind != (INDEX_VERSION, data_format, alignment.shift):
            return {}
        return {path: _entry_from_json(path, fields) for path, fields in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_index(
    entries: Iterable[Entry], file: Path, *, data_format: str, alignment: Alignment
) -> None:
    """Save the headers, for the next scan of the same files."""
    files = {}
    for entry in entries:
        files[str(entry.file.absolute())] = {
            "name": entry.name,
            "stamp": asdict(entry.stamp),
            "header": asdict(entry.header),
            "fingerprint": entry.fingerprint,
        }
    content = {
        "index_version": INDEX_VERSION,
        "format": data_format,
        "shift": alignment.shift,
        "files": files,
    }
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content), "utf-8")


def _entry_from_json(path: str, fields: dict[str, Any]) -> Entry:
    header = SampleHeader(**fields["header"])
    if header.dtype not in ITEM_BYTES:
        raise ValueError("not a type of hidden states")
    numbers = {**fields["header"], "dtype": 0, "is_normed": 0}.values()
    if type(header.is_normed) is not bool or not all(type(x) is int for x in numbers):
        raise TypeError("not a header")
    stamp = FileStamp(**fields["stamp"])
    return Entry(Path(path), str(fields["name"]), stamp, header, str(fields["fingerprint"]))
