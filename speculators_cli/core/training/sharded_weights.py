"""ShardedWeights: each rank updates some rows of each matrix."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.kernels.arrival import expect_arrival, wait_for_arrival
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.weights import ReplicatedWeights, gradient_of


class ShardedWeights(ReplicatedWeights):
    """Matrices sharded by rows, with their optimizer state; vectors are replicated.

    The draft computes with whole working weights, gathered after each update. Those that a step
    only reads in the compute dtype are gathered in it, which changes no result and halves the
    bytes; gradients are summed in float32.

    Args:
        draft: On its device, the same on every rank.
        ranks: Connected; all must call.
        num_shards: Ranks that hold the weights together.
        compute_dtype: Of the layers.
    """

    def __init__(
        self, draft: DraftModel, ranks: Ranks, num_shards: int, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(draft, ranks)
        self.num_shards = num_shards
        self.mesh = make_mesh(ranks, num_shards)
        self.holders = self.everyone  # the ranks that hold the weights together
        self.copies: Any = None  # the ranks that hold the same shards
        if num_shards < ranks.num_ranks:
            self.holders = self.mesh.get_group("shard")
            self.copies = self.mesh.get_group("copy")
        # Rounded to bfloat16 first, weights in float8 would not be those of one rank.
        shared = {id(p) for p in draft.shared_weights() if not draft.use_float8}
        own = {id(p) for p in draft.awaited_weights()}
        matrices = [p for p in draft.parameters() if p.dim() > 1]
        self.shards = {
            id(p): WeightShard(
                p,
                self.mesh,
                index=ranks.rank % num_shards,
                num_shards=num_shards,
                dtype=compute_dtype if id(p) in shared else torch.float32,
            )
            for p in matrices
        }
        self.waited = [p for p in matrices if id(p) not in own]
        draft.register_forward_pre_hook(lambda *_: wait_for_arrival(self.waited))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Shards of the matrices as DTensors, and vectors."""
        for name, parameter in self.draft.named_parameters():
            shard = self.shards.get(id(parameter))
            yield name, parameter if shard is None else shard.parameter

    def publish(self, *, trained_only: bool = False) -> None:
        """Gather matrices, in the order in which a forward pass reads them."""
        buckets = [bucket[::-1] for bucket in reversed(self.buckets)] or [self.matrices]
        if not trained_only:
            buckets.append([p for p in self.draft.parameters() if self._is_frozen_matrix(p)])
        for bucket in buckets:
            # A collective has one dtype.
            for _, group in groupby(bucket, key=lambda p: p.dtype):
                self._gather(list(group))

    @staticmethod
    def _is_frozen_matrix(parameter: nn.Parameter) -> bool:
        return parameter.dim() > 1 and not parameter.requires_grad

    def _gather(self, parameters: Sequence[nn.Parameter]) -> None:
        shards = [self.shards[id(parameter)] for parameter in parameters]
        own = [shard.pad(shard.local.to(shard.whole.dtype)) for shard in shards]
        with self.lane.open(*own):
            wholes = [shard.whole for shard in shards]
            self.holders.allgather_into_tensor_coalesced(wholes, own).wait()
            expect_arrival(parameters)

    def _sum(self, bucket: Sequence[nn.Parameter]) -> None:
        shards = [self.shards[id(parameter)] for parameter in bucket]
        gradients = [
            shard.pad_whole(gradient_of(parameter))
            for shard, parameter in zip(shards, bucket, strict=True)
        ]
        own = [shard.local.new_empty(shard.num_rows, *shard.shape[1:]) for shard in shards]
        with self.lane.open(*gradients, *own):
            self.holders.reduce_scatter_tensor_coalesced(own, gradients).wait()
            if self.copies is not None:
                self.copies.allreduce_coalesced(own).wait()
        for parameter, shard, gradient in zip(bucket, shards, own, strict=True):
            parameter.grad = None
            shard.set_gradient(gradient)


class WeightShard:
    """One rank's rows of a matrix, and the whole matrix that the draft computes with.

    All ranks have equally many rows in a collective: the last ones may be padding.

    Args:
        weight: A parameter of the draft; its data become a part of the gathered matrix.
        mesh: The ranks.
        index: Of this rank's shard.
        num_shards: Of them.
        dtype: Of the gathered matrix.
    """

    def __init__(
        self, weight: nn.Parameter, mesh: DeviceMesh, *, index: int, num_shards: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.mesh, self.placements = mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        self.shape, self.stride = weight.shape, weight.stride()
        self.num_rows = -(-len(weight) // num_shards)
        self.local = weight.detach()[index * self.num_rows :][: self.num_rows].clone()
        self.parameter = nn.Parameter(self._wrap(self.local), requires_grad=weight.requires_grad)
        padded = (num_shards * self.num_rows, *weight.shape[1:])
        self.whole = torch.empty(padded, dtype=dtype, device=weight.device)
        self.whole[: len(weight)].copy_(weight.detach())
        weight.data = self.whole[: len(weight)]
        weight.grad_dtype = torch.float32

    def pad(self, rows: Tensor) -> Tensor:
        """This rank's rows with padding."""
        return _pad(rows, self.num_rows)

    def pad_whole(self, rows: Tensor) -> Tensor:
        """All rows with padding, contiguous."""
        return _pad(rows, len(self.whole))

    def set_gradient(self, own: Tensor) -> None:
        """Set the gradient of this rank's rows."""
        self.parameter.grad = self._wrap(own[: len(self.local)])

    def _wrap(self, local: Tensor) -> DTensor:
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def make_mesh(ranks: Ranks, num_shards: int) -> DeviceMesh:
    """The ranks as a mesh of copies of shards; all ranks must call."""
    copies = ranks.num_ranks // num_shards
    kind = ranks.device.type
    if copies == 1:
        return init_device_mesh(kind, (num_shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (copies, num_shards), mesh_dim_names=("copy", "shard"))


def _pad(rows: Tensor, num_rows: int) -> Tensor:
    if len(rows) == num_rows:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])))
