"""DraftWeights: the float32 weights that the optimizer updates, on one rank or on several.

With several ranks, gradients are summed and weights are gathered on a stream of their own: the sum
of a gradient starts as soon as the backward has completed it, and the gather of a weight has until
the next step reads it. The model knows neither.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.kernels.arrival import expect_arrival, wait_for_arrival
from speculators_cli.core.training.distributed import Ranks, count_shards, make_mesh

# Sums of gradients per step, about: each costs the host time, and the last one is never hidden.
NUM_SUMS = 8


class DraftWeights:
    """The weights of a run of one process: the draft's own parameters.

    Args:
        draft: On its device.
    """

    num_shards = 1

    def __init__(self, draft: DraftModel) -> None:
        self.draft = draft

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer updates and checkpoints contain, by the draft's names; float32."""
        return self.draft.named_parameters()

    def start_last_backward(self) -> None:
        """Announce that the next backward completes the gradients of a step."""

    def finish_gradients(self) -> None:
        """Give the parameters their gradients, summed over all ranks."""

    def publish(self, *, trained_only: bool = False) -> None:
        """Let the draft compute with the parameters as they are now; frozen ones, too, or not."""


class ReplicatedWeights(DraftWeights):
    """A copy of all weights on each rank; gradients are summed by all-reduce, in float32.

    Matrices are summed in buckets, in the same order on every rank, whatever order its backward
    has: that of rank 0's first step.

    Args:
        draft: On its device, the same on every rank.
        ranks: Connected; all must call.
    """

    def __init__(self, draft: DraftModel, ranks: Ranks) -> None:
        super().__init__(draft)
        self.ranks = ranks
        self.everyone: Any = dist.new_group()  # apart from other sums, which wait for none of these
        self.lane = Lane(ranks.device)
        trained = [p for p in draft.parameters() if p.requires_grad]
        self.matrices = [p for p in trained if p.dim() > 1]
        self.vectors = [p for p in trained if p.dim() == 1]
        self.buckets: list[list[nn.Parameter]] = []  # of matrices, in the order of their sums
        self.num_sent = 0  # of `buckets`
        self.complete: dict[int, nn.Parameter] = {}  # by id, what the last backward has completed
        self.is_last = False
        for parameter in self.matrices:
            parameter.register_post_accumulate_grad_hook(self._take)

    def start_last_backward(self) -> None:
        """Announce that the next backward completes the gradients of a step."""
        self.is_last = True
        self.num_sent = 0
        self.complete = {}

    def _take(self, parameter: Tensor) -> None:
        """Note a complete gradient, and sum the buckets that are complete with it."""
        if not self.is_last:
            return
        assert isinstance(parameter, nn.Parameter)
        self.complete[id(parameter)] = parameter
        for bucket in self.buckets[self.num_sent :]:
            if any(id(p) not in self.complete for p in bucket):
                break
            self._sum(bucket)
            self.num_sent += 1

    def finish_gradients(self) -> None:
        """Give the parameters their gradients, summed over all ranks."""
        if not self.buckets:
            self.buckets = fill_buckets(self._agree_on_order())
        for bucket in self.buckets[self.num_sent :]:
            self._sum(bucket)
        self._sum_vectors()
        self.lane.join()
        self.is_last = False

    def _agree_on_order(self) -> list[nn.Parameter]:
        """Rank 0's order of completion, and then what it has not completed."""
        places = {id(p): index for index, p in enumerate(self.matrices)}
        found = [places[key] for key in self.complete]
        rest = [index for index in range(len(self.matrices)) if index not in found]
        order = torch.tensor([*found, *rest], device=self.ranks.device)
        dist.broadcast(order, 0)
        return [self.matrices[index] for index in order.tolist()]

    def _sum(self, bucket: Sequence[nn.Parameter]) -> None:
        gradients = [_gradient_of(parameter) for parameter in bucket]
        with self.lane.open(*gradients):
            self.everyone.allreduce_coalesced(gradients).wait()

    def _sum_vectors(self) -> None:
        """Sum the gradients of all norm weights and biases at once."""
        gradients = [_gradient_of(parameter) for parameter in self.vectors]
        flat = torch.cat([*gradients, torch.zeros(0, device=self.ranks.device)])
        with self.lane.open(flat):
            self.everyone.allreduce([flat]).wait()
            sums = flat.split([len(gradient) for gradient in gradients])
            torch._foreach_copy_(gradients, sums)


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
            shard.pad_whole(_gradient_of(parameter))
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


class Lane:
    """A stream beside the one that computes; on the CPU, collectives just block.

    What a collective reads or writes is kept until `join`, since the allocator knows nothing of the
    second stream.

    Args:
        device: Of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kept: list[Tensor] = []

    def open(self, *tensors: Tensor) -> AbstractContextManager[object]:
        """A block that runs on the stream, after all that has been enqueued until here."""
        if self.stream is None:
            return nullcontext()
        self.kept += tensors
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """Let what follows wait for the stream."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.kept.clear()


def fill_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters, in their order, into buckets of about an eighth of all values."""
    least = sum(p.numel() for p in parameters) / NUM_SUMS
    buckets: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(p.numel() for p in buckets[-1]) >= least:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets


def share_weights(
    draft: DraftModel, ranks: Ranks, sharding: str, compute_dtype: torch.dtype
) -> DraftWeights:
    """Place the weights of a draft, which is the same on every rank; all ranks must call.

    Args:
        draft: On its device.
        ranks: Connected, if there are several.
        sharding: `--sharding`.
        compute_dtype: Of the layers.
    """
    if ranks.num_ranks == 1:
        return DraftWeights(draft)
    num_trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    num_shards = count_shards(ranks, sharding, num_trained)
    if num_shards == 1:
        return ReplicatedWeights(draft, ranks)
    return ShardedWeights(draft, ranks, num_shards, compute_dtype)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient; zeros where no position of this rank reads the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad


def _pad(rows: Tensor, num_rows: int) -> Tensor:
    if len(rows) == num_rows:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])))
