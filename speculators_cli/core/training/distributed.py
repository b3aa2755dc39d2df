"""Ranks: the processes of a run, their devices, and their collectives."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from speculators_cli.core.errors import MachineError, SpeculatorsError
from speculators_cli.core.place import adopt_slurm, read_place
from speculators_cli.core.signals import StopSignals
from speculators_cli.core.training.watch import CollectiveError, RankWatch

T = TypeVar("T")

# Reading the headers of a million files on a slow disk takes this long at most.
PREPARATION_TIMEOUT = timedelta(hours=6)

# Below, a rank updates all weights faster than it gathers what others have updated.
MIN_SHARDED_WEIGHTS = 20_000_000


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as seen by one of them."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    device: torch.device
    store: Any  # torch.distributed.Store, or None in a run of one process
    watch: RankWatch | None = None  # set if there is a store

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and reports progress."""
        return self.rank == 0

    def first_then_others(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the others, which reuse its caches.

        Usable before the process group exists, so long work meets no collective's timeout. If rank
        0 fails, its launcher ends the others.
        """
        if self.store is None:
            return work()
        if self.is_first:
            result = work()
            self.store.set(name, "done")
            return result
        self._wait_for(name)
        return work()

    def connect(self, timeout_seconds: int) -> None:
        """Create the process group: NCCL between GPUs, gloo between CPUs.

        Raises:
            LostRanksError: Not all ranks joined.
        """
        if self.watch is None:
            return
        self.watch.gather()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(  # type: ignore[attr-defined]
                "group", self.store
            ),
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=self._timeout_after(timeout_seconds),
        )

    def new_local_group(self) -> Any:
        """A group of the ranks of each machine, apart from other collectives; all must call."""
        assert self.watch is not None, "there are other ranks"
        timeout = self._timeout_after(self.watch.timeout_seconds)
        group, _ = dist.new_subgroups(self.num_local_ranks, timeout=timeout)
        return group

    def _timeout_after(self, seconds: int) -> timedelta:
        # NCCL's own timeout aborts without the number of the rank, so it must be the longer one.
        return timedelta(seconds=2 * seconds + 60 if self.device.type == "cuda" else seconds)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; enqueued, not waited for, where `tensor` is on a GPU."""
        if self.watch is not None:
            self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def max(self, value: float) -> float:
        """The largest value over ranks; reduced on the CPU, so no GPU waits."""
        if self.watch is None:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        self._reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        assert self.watch is not None, "there are other ranks"
        self.watch.passed()
        if tensor.is_cuda:
            dist.all_reduce(tensor, operation)
            return
        try:
            work = dist.all_reduce(tensor, operation, async_op=True)
            work.wait(timedelta(seconds=self.watch.timeout_seconds))
        except RuntimeError as error:
            raise CollectiveError(str(error)) from None

    def _wait_for(self, name: str) -> None:
        assert self.watch is not None, "there are other ranks"
        self.watch.wait_for(name, PREPARATION_TIMEOUT)

    def ending_when_stuck(self) -> AbstractContextManager[None]:
        """End the process if a GPU waits for lost ranks, which raises no error."""
        if self.watch is None or self.device.type != "cuda":
            return nullcontext()
        return self.watch.ending_when_stuck()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.max(0.0)

    def share(self, name: str, text: str | None) -> str:
        """Rank 0's text, on every rank; usable before the process group exists."""
        if self.store is None or self.is_first:
            assert text is not None
            if self.store is not None:
                self.store.set(name, text)
            return text
        self._wait_for(name)
        return str(self.store.get(name).decode())


def end_process(error: SpeculatorsError) -> None:
    """End the process at once."""
    os._exit(error.exit_code)


@contextmanager
def start_ranks(
    device: str,
    timeout_seconds: int,
    *,
    signals: StopSignals | None = None,
    end: Callable[[SpeculatorsError], None] = end_process,
    is_slurm: bool = False,
) -> Iterator[Ranks]:
    """Determine the rank and its device; the process group is destroyed at a clean end.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_seconds: Of collectives.
        signals: Used to stop the run if its launcher has exited.
        end: Reports an error and ends the process, from threads that cannot raise it.
        is_slurm: Whether the caller has adopted the variables of a Slurm task already.

    Raises:
        SettingsError: The environment variables are inconsistent.
        LostRanksError: Other ranks failed, died or hang.
    """
    is_slurm = adopt_slurm(os.environ) or is_slurm
    place = read_place(os.environ)
    if place.num_ranks == 1:
        yield Ranks(0, 1, 0, 1, _choose_device(device, 0), None)
        return
    watch = RankWatch(
        place,
        timeout_seconds=timeout_seconds,
        signals=signals or StopSignals(),
        end=end,
    )
    with watch.watching():
        yield Ranks(
            rank=place.rank,
            num_ranks=place.num_ranks,
            local_rank=place.local_rank,
            num_local_ranks=place.num_local_ranks,
            device=_choose_device(device, place.local_rank, sees_own_alone=is_slurm),
            store=watch.store,
            watch=watch,
        )
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(wanted: str, local_rank: int, *, sees_own_alone: bool = False) -> torch.device:
    """The GPU of this rank; with Slurm, each task may see only its own."""
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if num_gpus == 0:
        if wanted == "cuda":
            raise MachineError(
                "`--device cuda`: no GPU is visible to the process",
                hint="Check `nvidia-smi` and `CUDA_VISIBLE_DEVICES`, or pass `--device cpu`",
            )
        return torch.device("cpu")
    if sees_own_alone and num_gpus == 1:
        local_rank = 0
    if local_rank >= num_gpus:
        raise MachineError(
            f"Rank {local_rank} of this machine has no GPU: {num_gpus} visible",
            hint=f"Start {num_gpus} processes, or pass `--device cpu`",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # The host does little per step: starting a team of threads takes longer than the work,
    # especially while other threads read samples.
    torch.set_num_threads(1)
    return device


def count_shards(ranks: Ranks, sharding: str, num_trained: int) -> int:
    """Number of shards of weights and optimizer state.

    Args:
        ranks: Of the run.
        sharding: `shard`: one on each rank; `replicate`: whole on each; `auto`: one on each rank of
            a machine, with a copy on each machine, if the draft is large enough.
        num_trained: Weights that the optimizer updates.
    """
    if sharding == "shard":
        return ranks.num_ranks
    if sharding == "replicate" or num_trained < MIN_SHARDED_WEIGHTS:
        return 1
    return ranks.num_local_ranks
