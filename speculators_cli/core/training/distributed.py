"""Ranks: which process this is, what it computes on, and how all of them add up and agree."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from speculators_cli.core.errors import MachineError
from speculators_cli.settings.train import DistributedSettings

T = TypeVar("T")

# Reading the headers of a million files on a slow disk takes this long at most.
PREPARATION_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    device: torch.device
    store: Any  # torch.distributed.Store, or None in a run of one process

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def first_then_others(self, name: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the others, which find what it has cached.

        Usable before the process group exists, so long work meets no collective's timeout. If rank
        0 fails, its launcher ends the others.
        """
        if self.store is None:
            return work()
        if self.is_first:
            result = work()
            self.store.set(name, "done")
            return result
        self.store.wait([name], PREPARATION_TIMEOUT)
        return work()

    def connect(self, timeout_seconds: int) -> None:
        """Create the process group: NCCL between GPUs, gloo between CPUs."""
        if self.store is None:
            return
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(  # type: ignore[attr-defined]
                "group", self.store
            ),
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; enqueued, not waited for, where `tensor` is on a GPU."""
        if self.store is not None:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """The largest value of all ranks; goes through the CPU, so no GPU waits."""
        if self.store is None:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.max(0.0)

    def share(self, name: str, text: str | None) -> str:
        """Rank 0's text, on every rank; usable before the process group exists."""
        if self.store is None or self.is_first:
            assert text is not None
            if self.store is not None:
                self.store.set(name, text)
            return text
        self.store.wait([name], PREPARATION_TIMEOUT)
        return str(self.store.get(name).decode())


@contextmanager
def start_ranks(settings: DistributedSettings) -> Iterator[Ranks]:
    """Find out which rank this is and choose its device; the group is left at a clean end."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    is_distributed = "RANK" in os.environ and num_ranks > 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if is_distributed else 0
    store, rank = None, 0
    if is_distributed:
        store, rank, num_ranks = next(
            dist.rendezvous("env://")  # type: ignore[attr-defined]
        )
    yield Ranks(
        rank=rank,
        num_ranks=num_ranks if is_distributed else 1,
        local_rank=local_rank,
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed else 1,
        device=_choose_device(settings, local_rank),
        store=store,
    )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _choose_device(settings: DistributedSettings, local_rank: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    if num_gpus == 0:
        if settings.device == "cuda":
            raise MachineError(
                "`--device cuda`: this machine shows no GPU to the process",
                hint="Check `nvidia-smi` and `CUDA_VISIBLE_DEVICES`, or pass `--device cpu`",
            )
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise MachineError(
            f"Rank {local_rank} of this machine has no GPU: {num_gpus} visible",
            hint=f"Start {num_gpus} processes, or pass `--device cpu`",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # The host's part of a step is small: a team of threads takes longer to gather than to do it,
    # most of all beside those that read samples.
    torch.set_num_threads(1)
    return device


def shard(module: nn.Module, ranks: Ranks, sharding: str) -> None:
    """Spread a module's parameters over the ranks with FSDP2; nothing to do for one rank.

    The whole module is one FSDP unit: a draft is a layer or two, called once for each TTT step, so
    its weights are gathered once a step and its gradients summed once.

    Args:
        module: On its device, the same on every rank.
        ranks: Whom to spread over.
        sharding: `shard`: over all ranks; `replicate`: a copy on each; `auto`: over the ranks of a
            machine, a copy on each machine.
    """
    if ranks.num_ranks == 1:
        return
    fully_shard(module, mesh=_mesh(ranks, sharding))
    # The loss is divided by the count over all ranks, so gradients are summed, not averaged.
    # Each FSDP module has its own factor: one left at its default divides by the ranks again.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _mesh(ranks: Ranks, sharding: str) -> DeviceMesh:
    shards = {"shard": ranks.num_ranks, "replicate": 1, "auto": ranks.num_local_ranks}[sharding]
    copies = ranks.num_ranks // shards
    kind = ranks.device.type
    if copies == 1:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (copies, shards), mesh_dim_names=("copy", "shard"))
