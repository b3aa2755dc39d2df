"""OptimizerStep: one update of the draft from packed sequences that are on the device."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.noise import drop_and_add_noise
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.states import StateFiller, StoredStates
from speculators_cli.core.training.weights import DraftWeights

STORED = StoredStates()


class StepLog(Protocol):
    """Receives the counters of a step; does not read from the device."""

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Add the sums of one batch."""

    def add_broken(self, sample_ids: tuple[int, ...], is_broken: Tensor) -> None:
        """Record which documents of a batch were skipped."""


class NoLog:
    """A log that drops what it receives."""

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Do nothing."""

    def add_broken(self, sample_ids: tuple[int, ...], is_broken: Tensor) -> None:
        """Do nothing."""


class OptimizerStep:
    """Casts batches, adds noise, runs forward and backward, and updates the weights.

    Args:
        weights: Of the draft, which is on its device.
        ranks: The processes that share a step, connected.
        optimizer: Of the draft.
        compute_dtype: Of the layers.
        noise_std: Noise on aux hidden states, uniform in [-x, x].
        seed: Of the noise.
        filler: Gives batches their hidden states, if they were not read with them.
    """

    def __init__(
        self,
        weights: DraftWeights,
        ranks: Ranks,
        optimizer: Optimizer,
        *,
        compute_dtype: torch.dtype,
        noise_std: float,
        seed: int,
        filler: StateFiller = STORED,
    ) -> None:
        self.weights, self.draft = weights, weights.draft
        self.ranks = ranks
        self.optimizer = optimizer
        self.compute_dtype = compute_dtype
        self.noise_std = noise_std
        self.seed = seed
        self.filler = filler
        self.loss_weights = torch.tensor(self.draft.loss_weights, device=ranks.device)

    def run(self, batches: Sequence[Batch], log: StepLog, *, epoch: int, lr: float) -> Tensor:
        """Update the weights from this rank's packed sequences; returns the gradient norm."""
        ready = [self.prepare(batch, log, epoch) for batch in batches]
        # Depends only on masks, so the sum over ranks precedes the first forward pass.
        num_scored = torch.stack([self.draft.count_scored(batch) for batch in ready]).sum(0)
        weights = self.draft.normalise(self.loss_weights, self.ranks.sum(num_scored))
        for index, batch in enumerate(ready):
            sums = self.draft(batch, weights)
            if index == len(ready) - 1:
                self.weights.start_last_backward()
            sums.loss.backward()
            log.add(sums, batch)
        self.weights.finish_gradients()
        norm = self.optimizer.step(lr)
        self.weights.publish(trained_only=True)
        return norm

    def prepare(self, batch: Batch, log: StepLog, epoch: int) -> Batch:
        """Fill and cast a training batch, drop broken documents, add noise, draw positions."""
        ready, is_broken = drop_and_add_noise(
            self.filler.fill(batch).cast(self.compute_dtype),
            self.noise_std,
            seed=self.seed,
            epoch=epoch,
        )
        log.add_broken(batch.sample_ids, is_broken)
        return self.draft.draw(ready, seed=self.seed, epoch=epoch)
