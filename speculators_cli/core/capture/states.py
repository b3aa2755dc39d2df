"""From rows of tokens to v1 samples: pack, capture, copy to the host, write."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from speculators_cli.core.data.float8 import ScaledStates, quantize_rows
from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.packing import plan_epoch
from speculators_cli.core.data.sample import Sample, States
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.engines.engine import CapturedStates, Packed

MAX_IN_FLIGHT = 3  # packed sequences that are copied or written while the next one is computed


@dataclass(frozen=True)
class Storage:
    """How hidden states are stored."""

    dtype: Literal["bfloat16", "float8"] | None  # None: that of the verifier
    has_all_last_states: bool

    @property
    def is_float8(self) -> bool:
        """Whether they are quantized."""
        return self.dtype == "float8"

    def item_bytes(self, own: torch.dtype) -> int:
        """Return the size of a value, for states of dtype `own`."""
        sizes = {"float8": 1, "bfloat16": 2, None: own.itemsize}
        return sizes[self.dtype]


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
        self, row: TokenRow, copied: "HostStates", tokens: slice, last: slice, folder: Path
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


class HostStates:
    """States of a packed sequence on their way to the host; quantized on the device.

    Args:
        states: On the engine's device, or the CPU.
        storage: How they are stored.
    """

    def __init__(self, states: CapturedStates, storage: Storage) -> None:
        self._hidden_size = states.last.shape[1]
        self._num_layers = states.aux.shape[1] // self._hidden_size
        parts = {
            "aux": states.aux,
            "last": states.last,
            "is_finite": states.aux.isfinite().all(-1),
            "is_last_finite": states.last.isfinite().all(-1),
        }
        if storage.dtype == "bfloat16":
            parts |= {"aux": states.aux.bfloat16(), "last": states.last.bfloat16()}
        if storage.is_float8:
            values, scales = quantize_rows(states.aux.view(-1, self._hidden_size))
            parts["aux"] = values.view(len(states.aux), -1)
            parts["aux_scales"] = scales.view(len(states.aux), -1)
            parts["last"], parts["last_scales"] = quantize_rows(states.last)
        self._event: torch.cuda.Event | None = None
        self._parts = self._copy(parts) if states.aux.is_cuda else parts

    def _copy(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy on a stream of its own, behind the computation and beside the next one."""
        stream = _copy_stream(parts["aux"].device)
        stream.wait_stream(torch.cuda.current_stream(parts["aux"].device))
        with torch.cuda.stream(stream):
            copied = {}
            for name, part in parts.items():
                copied[name] = torch.empty_like(part, device="cpu", pin_memory=True)
                copied[name].copy_(part, non_blocking=True)
                part.record_stream(stream)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        return copied

    def wait(self) -> None:
        """Wait for the copy."""
        if self._event is not None:
            self._event.synchronize()

    def is_finite(self, tokens: slice, last: slice) -> bool:
        """Whether all states of a document are finite."""
        aux, own_last = self._parts["is_finite"][tokens], self._parts["is_last_finite"][last]
        return bool(aux.all() and own_last.all())

    def aux(self, tokens: slice) -> tuple[States, ...]:
        """Return the aux hidden states of a document, a layer each."""
        return tuple(self._states("aux", tokens, layer, layer) for layer in range(self._num_layers))

    def last(self, rows: slice) -> States:
        """Return the last hidden states of a document."""
        return self._states("last", rows, 0, 0)

    def _states(self, name: str, rows: slice, layer: int, column: int) -> States:
        start = layer * self._hidden_size
        values = self._parts[name][rows, start : start + self._hidden_size]
        scales = self._parts.get(f"{name}_scales")
        if scales is None:
            return values
        own = scales[rows].reshape(len(values), -1)[:, column, None]
        return ScaledStates(values, own)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
