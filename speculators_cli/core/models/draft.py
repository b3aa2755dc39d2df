"""DraftModel: all that the training loop knows of an algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.models.ttt import StepSums


class DraftModel(nn.Module, ABC):
    """A draft model being trained; its parameters are what is sharded, trained and saved."""

    @property
    @abstractmethod
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each TTT step in the loss."""

    @abstractmethod
    def count_scored(self, batch: Batch) -> Tensor:
        """Positions each TTT step will score, known from masks alone; [steps], int64."""

    @abstractmethod
    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Run all TTT steps over a batch that is on the device, in the compute dtype.

        `weights`, [steps], float32, is what a scored position of each step weighs in the loss,
        by default 1. A backward begins at the loss itself, not at a multiple of it.
        """

    @abstractmethod
    def checkpoint_config(self) -> dict[str, Any]:
        """Contents of the checkpoint's config.json."""

    @abstractmethod
    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the checkpoint that are not among the parameters."""
