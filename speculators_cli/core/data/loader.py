"""BatchLoader: one rank's slice of the packed sequences, from any step on."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import torch

from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.dataset import Dataset
from speculators_cli.core.data.packing import Packed, PackingPlan, plan_epoch


class BatchSource(Protocol):
    """Where a training loop gets its batches from."""

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Batches of each optimizer step of an epoch, from `start_step` on."""


class BatchLoader:
    """Reads packed sequences ahead, in threads: reading and copying leave the interpreter free.

    Args:
        dataset: The samples.
        total_seq_len: Tokens in one packed sequence.
        seed: Seed of the order.
        global_batch: Packed sequences an optimizer step takes over all ranks.
        rank: This rank.
        num_ranks: Ranks that share a step; divides `global_batch`.
        num_workers: Reading threads; 0 reads when a batch is asked for.
        prefetch_factor: Packed sequences each thread reads ahead.
        pin_memory: Whether batches are in memory a GPU can copy from by itself.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        total_seq_len: int,
        seed: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool,
    ) -> None:
        assert global_batch % num_ranks == 0, "ranks share a step evenly"
        self.dataset = dataset
        self.total_seq_len = total_seq_len
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_workers = num_workers
        self.num_ahead = num_workers * prefetch_factor
        self.pin_memory = pin_memory
        self._num_steps: dict[int, int] = {}
        self._latest: tuple[int, PackingPlan] | None = None

    def plan(self, epoch: int) -> PackingPlan:
        """The packed sequences of an epoch, over all ranks."""
        if self._latest is None or self._latest[0] != epoch:
            plan = plan_epoch(
                self.dataset.lengths,
                total_seq_len=self.total_seq_len,
                seed=self.seed,
                epoch=epoch,
                global_batch=self.global_batch,
            )
            self._latest = (epoch, plan)
            self._num_steps[epoch] = plan.num_steps
        return self._latest[1]

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        if epoch not in self._num_steps:
            self.plan(epoch)
        return self._num_steps[epoch]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """This rank's batches of each optimizer step of an epoch, from `start_step` on."""
        plan = self.plan(epoch)
        mine = plan.sequences[start_step * self.global_batch + self.rank :: self.num_ranks]
        batches = self._read(mine)
        per_step = self.global_batch // self.num_ranks
        for _ in range(start_step, plan.num_steps):
            yield tuple(islice(batches, per_step))

    def _read(self, sequences: tuple[Packed, ...]) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from map(self._collate, sequences)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="reader")
        try:
            ahead: deque[Future[Batch]] = deque()
            for sequence in sequences:
                ahead.append(pool.submit(self._collate, sequence))
                if len(ahead) > self.num_ahead:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _collate(self, sequence: Packed) -> Batch:
        return collate(
            sequence,
            [self.dataset.read(sample_id) for sample_id in sequence],
            total_seq_len=self.total_seq_len,
            num_aux_layers=self.dataset.num_aux_layers,
            hidden_size=self.dataset.hidden_size,
            dtype=getattr(torch, self.dataset.dtype),
            pin_memory=self.pin_memory,
        )
