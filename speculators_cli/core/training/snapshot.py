"""The whole state of weights and optimizer, gathered from all ranks and given back to them."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

_STATE = "state."


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name, on the CPU of rank 0; empty elsewhere. All ranks must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(module, options=options))


def gather_moments(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Whole optimizer state by parameter and kind, on the CPU of rank 0. All ranks must call."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
    )
    state = get_optimizer_state_dict(module, optimizer, options=options)
    return {
        name.removeprefix(_STATE): value
        for name, value in state.items()
        if name.startswith(_STATE) and isinstance(value, Tensor)
    }


def restore(
    module: nn.Module,
    optimizer: Optimizer,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    is_distributed: bool,
) -> None:
    """Give every rank its part of a saved state, which only rank 0 holds. All ranks must call."""
    options = StateDictOptions(
        full_state_dict=True,
        flatten_optimizer_state_dict=True,
        broadcast_from_rank0=is_distributed,
    )
    set_model_state_dict(module, dict(weights), options=options)
    state = get_optimizer_state_dict(module, optimizer, options=options)
    groups = {name: value for name, value in state.items() if not name.startswith(_STATE)}
    saved = {_STATE + name: value for name, value in moments.items()}
    set_optimizer_state_dict(module, optimizer, {**groups, **saved}, options=options)
