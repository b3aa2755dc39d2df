"""A verifier that several ranks hold together, layer by layer."""

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from speculators_cli.core.engines.verifier_layers import find_layers
from speculators_cli.core.training.distributed import Ranks, make_mesh


def shard_verifier(model: Any, ranks: Ranks, name: str) -> None:
    """Shard the decoder layers of a verifier on the CPU across the ranks of each machine.

    A layer is gathered while the one before it computes, and freed after it. Embedding, norm and LM
    head, which the draft reads as well, are whole on each rank.

    Args:
        model: A causal language model of transformers, on the CPU; moved to the device.
        ranks: Connected; all must call.
        name: Of the verifier, for error messages.

    Raises:
        SettingsError: The model has another layout than decoder layers and a final norm.
    """
    parts, mesh = find_layers(model, name), make_mesh(ranks, ranks.num_local_ranks)
    for layer in parts.layers:
        fully_shard(layer, mesh=mesh)
    own = {id(x) for layer in parts.layers for x in layer.parameters()}
    rest = {x for x in model.parameters() if id(x) not in own}
    for tensor in (*rest, *model.buffers()):
        tensor.data = tensor.data.to(ranks.device)
    # The root, which has no weights: layers share its streams, so gathers overlap with computing.
    fully_shard(parts.decoder, mesh=mesh, ignored_params=rest)


def count_own_bytes(model: Any) -> int:
    """Size of a model's weights on this rank, each counted once."""
    weights = {id(x): x for x in model.parameters()}.values()
    return sum(_own(x).nbytes for x in weights)


def _own(weight: Any) -> torch.Tensor:
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
