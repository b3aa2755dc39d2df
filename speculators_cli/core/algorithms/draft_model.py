"""DraftModel: the interface between a draft model and the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.models.verifier import FrozenVerifier


class StepSums(NamedTuple):
    """Sums over the positions of a packed sequence."""

    loss: Tensor  # float32 scalar with gradient
    counters: dict[str, Tensor]  # sums and counts by name, each [predictions]

    def stacked(self) -> Tensor:
        """All counters as one tensor without gradient; [counters, predictions], float64."""
        return torch.stack([sums.detach().double() for sums in self.counters.values()])


@dataclass(frozen=True)
class Ratio:
    """A metric of each prediction: one counter divided by another."""

    metric: str
    numerator: str
    denominator: str


class DraftModel(nn.Module, ABC):
    """A draft model being trained; its parameters are sharded, trained and saved.

    A draft makes one or more predictions at each position: tokens one, two, ... ahead.
    """

    config: DraftConfig
    verifier: FrozenVerifier  # whose parts it reads
    counters: ClassVar[tuple[str, ...]]  # names in `StepSums.counters`, in order
    # Metrics of each prediction. `loss` is among them; of `acceptance_rate`, where it is, the
    # simulated acceptance length is computed.
    ratios: ClassVar[tuple[Ratio, ...]]
    use_fast_kernels: bool  # whether a step uses the fast GPU kernels
    use_float8: bool = False  # whether its matrix products are in float8; with fast kernels only

    @property
    @abstractmethod
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each prediction in the loss."""

    @property
    def multiplies_in_float8(self) -> bool:
        """Whether products are in float8 now: validation computes what is exported."""
        return self.use_float8 and self.training

    def awaited_weights(self) -> Sequence[nn.Parameter]:
        """Matrices that a step reads through `SharedWeight` only: by default none.

        Other ranks may still send them when a forward pass starts.
        """
        return ()

    def shared_weights(self) -> Sequence[nn.Parameter]:
        """Those of them that it reads as they are: by default all.

        Other ranks may send them in the compute dtype, while their gradients are float32.
        """
        return self.awaited_weights()

    def once_run_weights(self) -> Sequence[nn.Parameter]:
        """Those of them whose gradient is a product or two per sequence: by default none.

        Where nothing else is added to them, such gradients need no sum in float32.
        """
        return ()

    def draw(self, batch: Batch, *, seed: int, epoch: int) -> Batch:  # noqa: ARG002
        """The batch with positions that this draft draws at random, on the host; before all else.

        A draw depends on the seed, the epoch and the samples only.
        """
        return batch

    def normalise(
        self,
        loss_weights: Tensor,  # [predictions], float32
        num_scored: Tensor,  # [predictions], int64: of all sequences of a step
    ) -> Tensor:
        """What a scored position of each prediction weighs: the loss is a sum of means."""
        return loss_weights / num_scored.clamp(min=1)

    @abstractmethod
    def count_scored(self, batch: Batch) -> Tensor:
        """Positions at which each prediction is scored, from masks only; [predictions], int64."""

    @abstractmethod
    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Score a batch that is on the device, in the compute dtype.

        `weights`, [predictions], float32, is what a scored position of each prediction weighs in
        the loss, by default 1. A backward begins at the loss itself, not at a multiple of it.
        """

    @abstractmethod
    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the checkpoint that are not among the parameters."""
