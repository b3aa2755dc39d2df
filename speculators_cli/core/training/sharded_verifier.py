"""A verifier that several ranks hold together, layer by layer."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speculators_cli.core.engines.verifier_layers import find_layers
from speculators_cli.core.training.distributed import Ranks

ALIGNMENT = 256  # bytes: of the weights in a layer's buffer


def shard_verifier(model: Any, ranks: Ranks, name: str) -> None:
    """Shard the decoder layers of a verifier across the ranks of each machine.

    Embedding, norm and LM head, which the draft reads as well, are whole on each rank.

    Args:
        model: A causal language model of transformers, on any device; moved to that of the ranks.
        ranks: Connected; all must call.
        name: Of the verifier, for error messages.

    Raises:
        SettingsError: The model has another layout than decoder layers and a final norm.
    """
    parts = find_layers(model, name)
    own = {id(x) for layer in parts.layers for x in layer.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in own:
            tensor.data = tensor.data.to(ranks.device)
    ShardedLayers(parts.layers, ranks)


def count_own_bytes(model: Any) -> int:
    """Size of a model's weights on this rank, with those that are gathered at a time."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(x.nbytes() for x in storages.values())


class ShardedLayers:
    """Gathers the weights of each layer for its forward pass.

    A rank holds an equal part of a layer's bytes. A layer is gathered while the one before it
    computes, and the first one, for the next pass, while the last one does. Layers alternate
    between two buffers, of which their weights are views, always at the same address. With an odd
    number of layers the last one has a third buffer, since the first one follows it.

    Args:
        layers: Called one after the other, in every pass; all have as many passes on each rank.
        ranks: Connected; all must call.
    """

    def __init__(self, layers: Sequence[nn.Module], ranks: Ranks) -> None:
        self.group = ranks.new_local_group()
        flats = [_Flat(list(layer.parameters()), ranks.num_local_ranks) for layer in layers]
        num_buffers = 2 + len(layers) % 2
        buffers = [
            torch.empty(max(x.num_bytes for x in flats), dtype=torch.uint8, device=ranks.device)
            for _ in range(num_buffers)
        ]
        self.shards: list[Tensor] = []  # of this rank
        self.wholes: list[Tensor] = []
        for index, (layer, flat) in enumerate(zip(layers, flats, strict=True)):
            shard = flat.read_shard(ranks.local_rank, ranks.device)
            layer.register_buffer("shard", shard, persistent=False)
            is_last = index == len(layers) - 1
            whole = buffers[-1 if is_last else index % 2][: flat.num_bytes]
            flat.view_in(whole)
            self.shards.append(shard)
            self.wholes.append(whole)
            layer.register_forward_pre_hook(partial(self._prepare, index))
        self._coming: tuple[int, dist.Work] | None = None  # the layer that is gathered, if any

    def _prepare(self, index: int, *_: Any) -> None:
        """Let the computation wait for a layer, and gather the one after it meanwhile."""
        if self._coming is None or self._coming[0] != index:
            self._gather(index)
        self._finish()
        self._gather((index + 1) % len(self.shards))

    def _gather(self, index: int) -> None:
        """Begin to gather a layer once all that has been enqueued until here is computed."""
        self._finish()
        self._coming = (
            index,
            self.group.allgather_into_tensor_coalesced([self.wholes[index]], [self.shards[index]]),
        )

    def _finish(self) -> None:
        if self._coming is not None:
            self._coming[1].wait()
            self._coming = None


class _Flat:
    """The weights of a layer as one range of bytes, in as many equal parts as there are ranks.

    Args:
        weights: Each once.
        num_shards: Ranks that hold them together.
    """

    def __init__(self, weights: Sequence[nn.Parameter], num_shards: int) -> None:
        self.weights = weights
        *self.starts, end = accumulate((_aligned(x.nbytes) for x in weights), initial=0)
        self.num_shard_bytes = _aligned(-(-end // num_shards))
        self.num_bytes = num_shards * self.num_shard_bytes

    def read_shard(self, index: int, device: torch.device) -> Tensor:
        """Return a copy of one part."""
        shard = torch.zeros(self.num_shard_bytes, dtype=torch.uint8, device=device)
        first = index * self.num_shard_bytes
        for weight, start in zip(self.weights, self.starts, strict=True):
            begin = max(start, first)
            end = min(start + weight.nbytes, first + self.num_shard_bytes)
            if begin < end:
                values = weight.detach().reshape(-1).view(torch.uint8)
                shard[begin - first : end - first] = values[begin - start : end - start]
        return shard

    def view_in(self, whole: Tensor) -> None:
        """Make the weights views of this range of bytes."""
        for weight, start in zip(self.weights, self.starts, strict=True):
            data = whole[start : start + weight.nbytes].view(weight.dtype)
            weight.data = data.view(weight.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
