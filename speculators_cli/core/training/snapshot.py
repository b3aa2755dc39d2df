"""The full state of weights and optimizer, gathered from all ranks and restored on them."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # shaped as the parameter
STEP = "step"  # a scalar


def gather_weights(module: nn.Module, *, on_every_rank: bool = False) -> dict[str, Tensor]:
    """Full parameters by name, on the CPU of rank 0 or of every rank; empty elsewhere.

    All ranks must call.
    """
    _reshard(module)
    return _gather(module.named_parameters(), on_every_rank=on_every_rank)


def gather_moments(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Full optimizer state as `{parameter}.{kind}`; otherwise like `gather_weights`."""
    _reshard(module)
    return _gather(
        (f"{name}.{kind}", optimizer.state[parameter][kind])
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for kind in (STEP, *MOMENTS)
    )


@torch.no_grad()
def restore(
    module: nn.Module,
    optimizer: Optimizer,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Restore a saved state on every rank; only rank 0 has it. All ranks must call."""
    for name, parameter in module.named_parameters():
        parameter.copy_(_spread(weights.get(name), like=parameter))
        if parameter.requires_grad:
            state = {
                kind: _spread(moments.get(f"{name}.{kind}"), like=parameter) for kind in MOMENTS
            }
            step = torch.zeros((), device=parameter.device)
            state[STEP] = _spread(moments.get(f"{name}.{STEP}"), like=step)
            optimizer.state[parameter] = state


def _reshard(module: nn.Module) -> None:
    """Restore the sharded parameters of the optimizer: a validation leaves them gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


def _gather(
    named: Iterable[tuple[str, Tensor]], *, on_every_rank: bool = False
) -> dict[str, Tensor]:
    is_kept = on_every_rank or not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, tensor in named:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_kept:
            gathered[name] = whole.detach().cpu()
    return gathered


def _spread(whole: Tensor | None, *, like: Tensor) -> Tensor:
    """Rank 0's tensor, placed as `like`; `whole` is None elsewhere."""
    if whole is None:
        whole = torch.empty(like.shape)
    on_device = whole.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(on_device, like.device_mesh, like.placements)
    if dist.is_initialized():
        dist.broadcast(on_device, 0)
    return on_device
