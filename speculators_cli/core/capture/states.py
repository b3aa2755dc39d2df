"""From rows of tokens to v1 samples: pack, capture, copy to the host, write."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.packing import plan_epoch
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.host_states import HostStates, Storage

MAX_IN_FLIGHT = 3  # packed sequences that are copied or written while the next one is computed


def plan_sequences(rows: Sequence[TokenRow], capture_tokens: int) -> Iterator[tuple[TokenRow, ...]]:
    """Pack rows into sequences of at most `capture_tokens` tokens; a longer row is alone.

    A function of the rows only, so a row has the same neighbours in every run.
    """
    lengths = np.array([len(row.input_ids) for row in rows], np.int64)
    plan = plan_epoch(lengths, total_seq_len=capture_tokens, seed=0, epoch=0, global_batch=1)
    for ids in plan.sequences:
        yield tuple(rows[i] for i in ids)


def pack(rows: Sequence[TokenRow], storage: Storage) -> Packed:
    """Join rows end to end."""
    input_ids = np.concatenate([row.input_ids for row in rows])
    is_kept = np.concatenate([row.loss_mask for row in rows]) | storage.has_all_last_states
    return Packed(
        torch.from_numpy(input_ids.astype(np.int64)),
        [len(row.input_ids) for row in rows],
        torch.from_numpy(np.flatnonzero(is_kept)),
    )


@dataclass
class WrittenShard:
    """Counts of the samples of a shard, once they are written."""

    folder: Path
    num_samples: int = 0
    num_bytes: int = 0
    non_finite: list[str] = field(default_factory=list)  # names of rows that were not written

    def count(self, name: str, num_bytes: int) -> None:
        """Count a sample; one of 0 bytes was not written."""
        if num_bytes:
            self.num_samples += 1
            self.num_bytes += num_bytes
        else:
            self.non_finite.append(name)


class SampleWriter:
    """Writes samples in threads, while the engine computes the next ones.

    Leaving the block waits for all samples, and raises what a thread has raised.

    Args:
        storage: How hidden states are stored.
        num_threads: Number of threads.
        on_shard: Called with each shard whose samples are all written.
    """

    def __init__(
        self, storage: Storage, num_threads: int, on_shard: Callable[[WrittenShard], None]
    ) -> None:
        self._storage = storage
        self._on_shard = on_shard
        self._pool = ThreadPoolExecutor(num_threads, "writer")
        self._in_flight: deque[Callable[[], None]] = deque()  # waits, and counts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._in_flight:
                self._in_flight.popleft()()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, rows: Sequence[TokenRow], states: CapturedStates, shard: WrittenShard) -> None:
        """Write the samples of a packed sequence, once the device has computed its states."""
        copied = HostStates(states, self._storage)
        bounds = [0, *accumulate(len(row.input_ids) for row in rows)]
        last_bounds = [0, *accumulate(map(self._count_last, rows))]
        spans = zip(rows, pairwise(bounds), pairwise(last_bounds), strict=True)
        futures = [
            self._pool.submit(self._write, row, copied, slice(*tokens), slice(*last), shard.folder)
            for row, tokens, last in spans
        ]

        def finish() -> None:
            for row, future in zip(rows, futures, strict=True):
                shard.count(row.name, future.result())

        self._put(finish)

    def finish(self, shard: WrittenShard) -> None:
        """Say that a shard has no further samples."""
        self._put(lambda: self._on_shard(shard))

    def _put(self, finish: Callable[[], None]) -> None:
        self._in_flight.append(finish)
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._in_flight.popleft()()

    def _count_last(self, row: TokenRow) -> int:
        if self._storage.has_all_last_states:
            return len(row.loss_mask)
        return int(row.loss_mask.sum())

    def _write(
        self, row: TokenRow, copied: HostStates, tokens: slice, last: slice, folder: Path
    ) -> int:
        """Write one sample; return the size of its file, 0 if its states are not finite."""
        copied.wait()
        if not copied.is_finite(tokens, last):
            return 0
        loss_mask = torch.from_numpy(row.loss_mask)
        last_states = copied.last(last)
        if not self._storage.has_all_last_states:
            last_states = SupervisedRows(last_states, loss_mask)
        sample = Sample(
            input_ids=torch.from_numpy(row.input_ids.astype(np.int64)),
            loss_mask=loss_mask,
            aux_hidden_states=copied.aux(tokens),
            last_hidden_states=last_states,
            is_normed=False,
        )
        file = sample_file(folder, row.name)
        v1.write_sample(sample, file)
        return file.stat().st_size


def sample_file(folder: Path, name: str) -> Path:
    """Return the file of a row's sample."""
    return folder / f"{name}.pt"
