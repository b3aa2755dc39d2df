"""The full state of weights and optimizer, gathered from all ranks and restored on them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.kernels.shards import is_shard
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.training.adamw import MOMENTS, STEP, AdamW


class Weights(Protocol):
    """A module, or what the ranks share of one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by name, float32; sharded ones are DTensors."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds; tensors are on the CPU, contiguous."""

    name: str  # of the checkpoint
    tensors: Mapping[str, Tensor]  # weights, and frozen tensors of the draft
    moments: Mapping[str, Tensor]  # of the optimizer
    config: Mapping[str, Any]
    state: TrainState


def full_weights(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Full parameters with their names, on their device, one at a time.

    All ranks must iterate to the end.
    """
    for name, parameter in weights.named_parameters():
        yield name, _full(parameter)


def full_moments(weights: Weights, optimizer: AdamW) -> Iterator[tuple[str, Tensor]]:
    """Full optimizer state as `{parameter}.{kind}`; otherwise like `full_weights`."""
    for name, parameter in weights.named_parameters():
        if parameter.requires_grad:
            for kind in (STEP, *MOMENTS):
                yield f"{name}.{kind}", _full(optimizer.state[parameter][kind])


@torch.no_grad()
def restore(
    parameters: Weights,
    optimizer: AdamW,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Restore a saved state on every rank; only rank 0 has it. All ranks must call."""
    for name, parameter in parameters.named_parameters():
        parameter.copy_(_spread(weights.get(name), like=parameter))
        if parameter.requires_grad:
            state = {
                kind: _spread(moments.get(f"{name}.{kind}"), like=parameter) for kind in MOMENTS
            }
            step = torch.zeros((), device=parameter.device)
            state[STEP] = _spread(moments.get(f"{name}.{STEP}"), like=step)
            optimizer.state[parameter] = state


def list_large_tensors(draft: DraftModel, weights: Weights) -> list[tuple[str, Tensor]]:
    """Names in a snapshot, each with a tensor of its shape, dtype and kind of device."""
    parameters = list(weights.named_parameters())
    moments = [
        (f"{name}.{kind}", parameter)
        for name, parameter in parameters
        if parameter.requires_grad
        for kind in MOMENTS
    ]
    return [*draft.frozen_tensors().items(), *parameters, *moments]


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_shard(tensor) else tensor).detach()


def _spread(whole: Tensor | None, *, like: Tensor) -> Tensor:
    """Rank 0's tensor, placed as `like`; `whole` is None elsewhere."""
    if whole is None:
        whole = torch.empty(like.shape)
    on_device = whole.to(like.device, like.dtype)
    if is_shard(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(on_device, like.device_mesh, like.placements)
    if dist.is_initialized():
        dist.broadcast(on_device, 0)
    return on_device
