"""Shards of tokens for tests, and samples with the same tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from speculators_cli.core.data.token_shards import (
    MANIFEST_NAME,
    TokenRow,
    TokenShard,
    shard_name,
    write_shard,
)
from speculators_cli.core.files import write_json
from tests.tiny_run import VOCAB


def make_rows(
    count: int, *, first: int = 0, seed: int = 0, shortest: int = 8, longest: int = 40
) -> list[TokenRow]:
    """Rows of random tokens, all but the first three of each supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(first, first + count):
        length = int(torch.randint(shortest, longest, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        rows.append(TokenRow(f"{index:06d}", ids.numpy().astype(np.int32), np.arange(length) >= 3))
    return rows


def make_shard(rows: Sequence[TokenRow]) -> TokenShard:
    """A shard with the counts that its samples need."""
    counts = {
        "num_tokens": sum(len(row.input_ids) for row in rows),
        "num_supervised_tokens": sum(int(row.loss_mask.sum()) for row in rows),
    }
    return TokenShard(tuple(rows), {"rendered": counts})


def write_tokens(folder: Path, *shards: Sequence[TokenRow], verifier: str | None = None) -> Path:
    """Write shards and their manifest."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(shards):
        write_shard(make_shard(rows), folder / shard_name(number))
    write_json({"verifier": verifier}, folder / MANIFEST_NAME)
    return folder
