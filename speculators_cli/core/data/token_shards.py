"""Shards of tokens: ids and loss masks of many conversations in one file, without hidden states.

A shard is a safetensors file, 5 bytes per token. Names of rows, and counts of the conversations
that the shard was made from, are in its metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from speculators_cli.core.data.sample import check_ids
from speculators_cli.core.errors import DataError
from speculators_cli.core.files import replacing
from speculators_cli.core.reading import (
    Tensors,
    UnreadableError,
    open_safetensors,
    parse_json,
    refusing,
)

FORMAT = "speculators-tokens-1"
PREFIX, SUFFIX = "tokens-", ".safetensors"
MANIFEST_NAME = "manifest.json"  # beside the shards: what they were made from
FIX = "Remove the file, then rerun `speculators generate-data`"


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
    description = {"names": [row.name for row in rows], "counts": shard.counts}
    # One entry: the library writes several in a random order, and equal shards have equal bytes.
    metadata = {FORMAT: json.dumps(description, sort_keys=True)}
    # Not by safetensors itself, whose errors do not tell a full disk.
    with replacing(file) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def read_shard(file: Path) -> TokenShard:
    """Read a shard.

    Raises:
        DataError: It is not a shard, or damaged.
    """
    with refusing(DataError), open_safetensors(file, fix=FIX) as content:
        names, counts = (_read_json(content, key) for key in ("names", "counts"))
        ids, mask, lengths = (
            content.get_tensor(key).numpy() for key in ("input_ids", "loss_mask", "lengths")
        )
        if (
            {ids.ndim, mask.ndim, lengths.ndim} != {1}
            or len(names) != len(lengths)
            or not len(ids) == len(mask) == lengths.sum()
            or (lengths < 0).any()
        ):
            raise UnreadableError(file, "has parts of different lengths", hint=FIX)
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
    with refusing(DataError), open_safetensors(file, fix=FIX) as content:
        counts: dict[str, Any] = _read_json(content, "counts")
        return counts


def _read_json(content: Tensors, key: str) -> Any:
    metadata = content.metadata()
    description = parse_json(metadata.get(FORMAT, "null"), content.file, fix=FIX)
    if not isinstance(description, dict) or key not in description:
        raise UnreadableError(content.file, "is not a shard of tokens of this version", hint=FIX)
    return description[key]


def _join(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
