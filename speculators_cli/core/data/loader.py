"""BatchLoader: one rank's share of the packed sequences, starting from any step."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.packing import Packed, PackingPlan, plan_epoch
from speculators_cli.core.data.source import SampleSource

Place = tuple[int, int]  # epoch, and index among this rank's packed sequences in it


@dataclass(frozen=True)
class Pending:
    """A batch that has been or will be prefetched."""

    place: Place
    batch: Future[Batch]


class BatchSource(Protocol):
    """Source of the batches of a training loop."""

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Yield the batches of each optimizer step of an epoch, from `start_step` on."""

    def close(self) -> None:
        """Stop reading; no batches are requested afterwards."""


class BatchLoader:
    """Prefetches packed sequences in threads: reading and copying release the interpreter lock.

    Prefetching continues after the last requested packed sequence, across epochs, to the end of the
    run. Prefetched batches are kept until they are requested; a request out of order drops them.

    Prefetched batches use memory, so initially there is one per thread. Each time the next one is
    still being read when it is requested, their number may grow by one.

    Args:
        samples: Samples to read.
        total_seq_len: Tokens per packed sequence.
        seed: Seed of the order.
        global_batch: Packed sequences per optimizer step over all ranks.
        rank: This rank.
        num_ranks: Number of ranks; divides `global_batch`.
        num_epochs: Epochs of the run; nothing is prefetched beyond the last.
        max_steps: Optimizer steps of the run, if it ends before its last epoch does.
        num_workers: Number of reading threads; 0 reads each batch when requested.
        prefetch_factor: Maximum number of prefetched packed sequences per thread.
        pin_memory: Whether batches are in pinned memory.
        pads: Whether every packed sequence is padded to the maximum length, so that a GPU's memory
            is reused for the same sizes. On a CPU, padding would cost time.
    """

    def __init__(
        self,
        samples: SampleSource,
        *,
        total_seq_len: int,
        seed: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        num_epochs: int,
        max_steps: int | None,
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        pads: bool,
    ) -> None:
        assert global_batch % num_ranks == 0, "each rank has the same number of sequences per step"
        self.samples = samples
        self.total_seq_len = total_seq_len
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_epochs = num_epochs
        self.max_steps = max_steps
        self.max_ahead = num_workers * prefetch_factor
        self.pin_memory = pin_memory
        self.pads = pads
        self._per_step = global_batch // num_ranks
        self._num_steps: dict[int, int] = {}
        self._latest: tuple[int, PackingPlan] | None = None
        self._pool = ThreadPoolExecutor(num_workers, "reader") if num_workers else None
        self._num_ahead = num_workers  # current limit of prefetched batches
        self._ahead: deque[Pending] = deque()
        self._coming: Iterator[Place] = iter(())  # places after those

    def pack(self, epoch: int) -> PackingPlan:
        """Return the packed sequences of an epoch, over all ranks."""
        if self._latest is None or self._latest[0] != epoch:
            packing = plan_epoch(
                self.samples.lengths,
                total_seq_len=self.total_seq_len,
                seed=self.seed,
                epoch=epoch,
                global_batch=self.global_batch,
            )
            self._latest = (epoch, packing)
            self._num_steps[epoch] = packing.num_steps
        return self._latest[1]

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        if epoch not in self._num_steps:
            self.pack(epoch)
        return self._num_steps[epoch]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Yield this rank's batches of each optimizer step of an epoch, from `start_step` on."""
        for step in range(start_step, self.steps_in(epoch)):
            first = step * self._per_step
            yield tuple(self._take((epoch, first + i)) for i in range(self._per_step))

    def read_ahead_from(self, epoch: int, step: int) -> None:
        """Start reading the batches from a step on, before they are requested."""
        if self._pool is None or epoch >= self.num_epochs or step >= self.steps_in(epoch):
            return
        place = (epoch, step * self._per_step)
        if place < self._end:
            self._schedule(place)

    @property
    def pending(self) -> tuple[Future[Batch], ...]:
        """Batches that are read ahead, whether they are ready or not."""
        return tuple(pending.batch for pending in self._ahead)

    def close(self) -> None:
        """Stop reading; in-flight reads are discarded."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, place: Place) -> Batch:
        """Return the batch of a place, after scheduling reads of the next ones."""
        if self._pool is None:
            return self._collate(self._sequence(place))
        self._schedule(place)
        return self._ahead.popleft().batch.result()

    def _schedule(self, place: Place) -> None:
        """Read the batch of a place, and the next ones."""
        assert self._pool is not None, "without threads nothing is read ahead"
        if not self._ahead or self._ahead[0].place != place:
            self._drop_ahead()
            self._coming = self._places_from(place)
        elif not self._ahead[0].batch.done():
            self._num_ahead = min(self._num_ahead + 1, self.max_ahead)
        for coming in islice(self._coming, 1 + self._num_ahead - len(self._ahead)):
            batch = self._pool.submit(self._collate, self._sequence(coming))
            self._ahead.append(Pending(coming, batch))

    def _drop_ahead(self) -> None:
        for pending in self._ahead:
            pending.batch.cancel()
        self._ahead.clear()

    def _places_from(self, place: Place) -> Iterator[Place]:
        """Yield a place, and all that follow it in the run."""
        epoch, index = place
        yield place
        while True:
            index += 1
            if index == self.steps_in(epoch) * self._per_step:
                epoch, index = epoch + 1, 0
            if (epoch, index) >= self._end:
                return
            yield epoch, index

    @cached_property
    def _end(self) -> Place:
        """Return the first place after the run's last step."""
        if self.max_steps is not None:
            steps_left = self.max_steps
            for epoch in range(self.num_epochs):
                if steps_left < self.steps_in(epoch):
                    return epoch, steps_left * self._per_step
                steps_left -= self.steps_in(epoch)
        return self.num_epochs, 0

    def _sequence(self, place: Place) -> Packed:
        epoch, index = place
        return self.pack(epoch).sequences[index * self.num_ranks + self.rank]

    def _collate(self, sequence: Packed) -> Batch:
        total_seq_len = self.total_seq_len
        if not self.pads:
            num_positions = int(self.samples.lengths[list(sequence)].sum())
            total_seq_len = max(min(total_seq_len, num_positions), 1)
        return self.samples.collate(
            sequence,
            total_seq_len=total_seq_len,
            pin_memory=self.pin_memory,
            pads=self.pads,
        )
