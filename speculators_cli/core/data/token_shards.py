"""Shards of tokens: ids and loss masks of many conversations in one file, without hidden states.

A shard is a safetensors file, 5 bytes per token. Names of rows, and counts of the conversations
that the shard was made from, are in its metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speculators_cli.core.data.sample import check_ids
from speculators_cli.core.errors import DataError
from speculators_cli.core.files import check_regular, replacing

FORMAT = "speculators-tokens-1"
PREFIX, SUFFIX = "tokens-", ".safetensors"
MANIFEST_NAME = "manifest.json"  # beside the shards: what they were made from


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row of tokens: what becomes one sample."""

    name: str  # unique; the name of the sample's file: `000123`, or `000123-turn2`
    input_ids: NDArray[np.int32]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]


@dataclass(frozen=True)
class TokenShard:
    """The rows of consecutive conversations."""

    rows: tuple[TokenRow, ...]
    counts: Mapping[str, Any]  # JSON: what was counted while the rows were made


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{PREFIX}{number:05d}{SUFFIX}"


def is_shard_name(name: str) -> bool:
    """Whether a file has the name of a shard of tokens."""
    number = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    return number.isdecimal() and name == f"{PREFIX}{number}{SUFFIX}"


def write_shard(shard: TokenShard, file: Path) -> None:
    """Write a shard atomically."""
    rows = shard.rows
    tensors = {
        "input_ids": _join([row.input_ids for row in rows], np.int32),
        "loss_mask": _join([row.loss_mask for row in rows], np.bool_),
        "lengths": np.array([len(row.input_ids) for row in rows], np.int64),
    }
    metadata = {
        "format": FORMAT,
        "names": json.dumps([row.name for row in rows]),
        "counts": json.dumps(shard.counts, sort_keys=True),
    }
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata)


def read_shard(file: Path) -> TokenShard:
    """Read a shard.

    Raises:
        DataError: It is not a shard, or damaged.
    """
    with _opening(file) as (content, metadata):
        ids, mask, lengths = (
            content.get_tensor(key) for key in ("input_ids", "loss_mask", "lengths")
        )
        names, counts = json.loads(metadata["names"]), json.loads(metadata["counts"])
    if len(names) != len(lengths) or not len(ids) == len(mask) == lengths.sum():
        raise _damaged(file, "has parts of different lengths")
    check_ids(ids.astype(np.int64), "input_ids")
    ends = np.cumsum(lengths)
    spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    rows = (TokenRow(name, ids[span], mask[span]) for name, span in zip(names, spans, strict=True))
    return TokenShard(tuple(rows), counts)


def read_counts(file: Path) -> dict[str, Any]:
    """Read the counts of a shard, without its rows.

    Raises:
        DataError: It is not a shard, or damaged.
    """
    with _opening(file) as (_, metadata):
        counts: dict[str, Any] = json.loads(metadata["counts"])
        return counts


@contextmanager
def _opening(file: Path) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """Open a shard; yield its content and its metadata."""
    try:
        check_regular(file)
        with safe_open(file, framework="numpy") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise _damaged(file, "is not a shard of tokens of this version")
            yield content, metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(file, f"cannot be read: {error}") from None
    except OSError as error:
        raise _damaged(file, f"cannot be read: {error.strerror}") from None


def _join(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _damaged(file: Path, problem: str) -> DataError:
    return DataError(
        f"`{file}` {problem}", hint="Remove the file, then rerun `speculators generate-data`"
    )
