"""Saver: checkpoints, written behind the training from a copy in host memory."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.host_copy import HostCopy
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.snapshot import (
    Snapshot,
    full_moments,
    full_weights,
    list_large_tensors,
)
from speculators_cli.core.training.weights import DraftWeights


@dataclass(frozen=True)
class PendingWrite:
    """A checkpoint that the thread is writing."""

    name: str
    waited_seconds: float  # of training
    written_seconds: "Future[float]"


class Saver:
    """Saves checkpoints: training waits for a copy in host memory, a thread writes the files.

    At most one checkpoint is being written: there is one copy, which the next save overwrites. Only
    rank 0 writes; the other ranks take part in gathering the state.

    Args:
        folder: The save path, on rank 0; None on other ranks and in a dry run.
        ranks: The processes of the run, connected.
        keep: Latest checkpoints to keep in addition to the best; None: all.
        progress: Receives a line for each checkpoint that is complete.
    """

    def __init__(
        self, folder: RunFolder | None, ranks: Ranks, *, keep: int | None, progress: Progress
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self.progress = progress
        self.waited_seconds = 0.0  # of training, over all saves
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reserved: Future[None] | None = None
        self._pending: PendingWrite | None = None

    def prepare(self, weights: DraftWeights) -> None:
        """Start allocating the host memory, which takes seconds where it is pinned."""
        if self.folder is not None:
            self._reserved = self._thread.submit(
                self._host.reserve, list_large_tensors(weights.draft, weights)
            )

    def save(
        self, name: str, shared: DraftWeights, optimizer: Optimizer, state: TrainState
    ) -> None:
        """Copy the state and start writing it, after the write before it. All ranks must call.

        Raises:
            MachineError: The checkpoint before it could not be written, or memory is short.
            CheckpointError: Another file or folder is in the place of the one before it.
        """
        began_at = time.perf_counter()
        self._end_pending()
        draft = shared.draft
        weights, moments = full_weights(shared), full_moments(shared, optimizer.adamw)
        if self.folder is None:
            deque(chain(weights, moments), maxlen=0)
            return
        if self._reserved is not None:
            self._reserved.result()
        snapshot = Snapshot(
            name,
            tensors=self._host.copy(chain(draft.frozen_tensors().items(), weights)),
            moments=self._host.copy(moments),
            config=draft.config.to_json(),
            state=replace(state, num_skipped_steps=int(optimizer.num_skipped)),
        )
        waited = time.perf_counter() - began_at
        self.waited_seconds += waited
        written = self._thread.submit(write, self.folder, snapshot, keep=self.keep)
        self._pending = PendingWrite(name, waited, written)

    def check(self) -> None:
        """Report the checkpoint being written if it is complete, or raise its error."""
        if self._pending is not None and self._pending.written_seconds.done():
            self._end_pending()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. All ranks must call.

        Raises:
            MachineError: It could not be written.
            CheckpointError: Another file or folder is in its place.
        """
        began_at = time.perf_counter()
        self._end_pending()
        self.waited_seconds += time.perf_counter() - began_at
        self.ranks.barrier()

    def close(self) -> None:
        """Finish writing; an error is a warning, since another one has ended the run."""
        try:
            self._end_pending()
        except SpeculatorsError as error:
            self.progress.warn(error.message, hint=error.hint)
        self._thread.shutdown()
        self._host.close()

    def _end_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        seconds = pending.written_seconds.result()
        self.progress.info(
            f"Saved `{pending.name}`: training waited {pending.waited_seconds:.2f} s, "
            f"written in {seconds:.2f} s"
        )


def write(folder: RunFolder, snapshot: Snapshot, *, keep: int | None) -> float:
    """Write a checkpoint, point at the best one, remove old ones; returns the seconds it took."""
    began_at = time.perf_counter()
    folder.save(snapshot)
    best = snapshot.state.best
    if best is not None:
        folder.set_best(best["name"])
    folder.prune(keep)
    return time.perf_counter() - began_at
