"""DraftWeights: the float32 weights that the optimizer updates, on one rank or on several.

With several ranks, gradients are summed and weights are gathered on a stream of their own: the sum
of a gradient starts as soon as the backward has completed it, and the gather of a weight has until
the next step reads it. The model knows neither.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.training.distributed import Ranks

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
        gradients = [gradient_of(parameter) for parameter in bucket]
        with self.lane.open(*gradients):
            self.everyone.allreduce_coalesced(gradients).wait()

    def _sum_vectors(self) -> None:
        """Sum the gradients of all norm weights and biases at once."""
        gradients = [gradient_of(parameter) for parameter in self.vectors]
        flat = torch.cat([*gradients, torch.zeros(0, device=self.ranks.device)])
        with self.lane.open(flat):
            self.everyone.allreduce([flat]).wait()
            sums = flat.split([len(gradient) for gradient in gradients])
            torch._foreach_copy_(gradients, sums)


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


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient; zeros where no position of this rank reads the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad
