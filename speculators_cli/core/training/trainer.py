"""Trainer: the loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, NoReturn

import torch

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.batch import Batch, drop_non_finite
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.noise import drop_and_add_noise
from speculators_cli.core.errors import DivergedError, StoppedError
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.signals import Interrupted, StopSignals
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.feed import DeviceFeed, StepBatches
from speculators_cli.core.training.metrics import Metrics, MetricSums, are_finite
from speculators_cli.core.training.optimizer import Optimizer, learning_rate
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.run_log import RunLog
from speculators_cli.core.training.snapshot import gather_moments, gather_weights
from speculators_cli.settings.train import TrainSettings


@dataclass
class Trainer:
    """Trains a draft model from a state to the last step."""

    settings: TrainSettings
    ranks: Ranks  # connected
    draft: DraftModel  # on its device, sharded
    optimizer: Optimizer
    loader: BatchSource  # training batches of this rank
    validation_loader: BatchSource | None  # None without validation
    compute_dtype: torch.dtype
    state: TrainState
    total_steps: int  # optimizer steps of the whole run
    folder: RunFolder | None  # on rank 0, unless it is a dry run
    log: RunLog
    signals: StopSignals = field(default_factory=StopSignals)  # open
    is_saved: bool = False  # whether a checkpoint holds this state

    def __post_init__(self) -> None:
        self.logged_step = self.state.step
        self.lr, self.grad_norm = 0.0, torch.zeros(())  # of the last step
        self.feed = DeviceFeed(self.ranks.device)
        self.loss_weights = torch.tensor(self.draft.loss_weights, device=self.ranks.device)

    def close(self) -> None:
        """Stop reading samples, however training ended."""
        self.loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()

    @property
    def is_epoch_whole(self) -> bool:
        """Whether all steps of the epoch are done; it is not yet validated and saved."""
        return self.state.step_in_epoch == self.loader.steps_in(self.state.epoch)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do: an epoch whose steps are done still wants its end."""
        return self.state.step >= self.total_steps and not self.is_epoch_whole

    def fit(self) -> None:
        """Train from the current step to the last one; a signal saves, wherever it comes.

        Raises:
            StoppedError: A signal came.
        """
        self.signals.defer()
        try:
            self.train_epochs()
        except Interrupted as stop:
            self.stop(stop.signal_number)

    def train_epochs(self) -> None:
        """Train to the last step, epoch by epoch."""
        for epoch in range(self.state.epoch, self.settings.run.epochs):
            self.train_epoch(epoch)
            if not self.is_epoch_whole:
                self.save(f"step-{self.state.step}")
                return
            self.finish_epoch(epoch)
            if self.state.step >= self.total_steps:
                return

    def train_epoch(self, epoch: int) -> None:
        """Train through the rest of an epoch, or up to the last step."""
        self.draft.train()
        self.log.start_clock(self.state.step)
        steps = self.feed.steps(self.loader.epoch(epoch, self.state.step_in_epoch))
        while (batches := self.take(steps)) is not None:
            self.train_step(batches, epoch)
            self.leave_if_asked()
            if self.state.step == self.total_steps:
                return
            if self.is_checkpoint_due():
                with self.log.paused():
                    self.save(f"step-{self.state.step}")

    def take(self, steps: Iterator[StepBatches]) -> StepBatches | None:
        """The batches of the next step, None at the end.

        Raises:
            Interrupted: A signal came while they were waited for.
        """
        with self.between_steps():
            return next(steps, None)

    def between_steps(self) -> AbstractContextManager[None]:
        """Where a single process may leave at any line; ranks leave together, after a step."""
        return self.signals.interruptible() if self.ranks.num_ranks == 1 else nullcontext()

    def train_step(self, batches: Sequence[Batch], epoch: int) -> None:
        """One optimizer step over this rank's packed sequences, which are on the device."""
        ready = [self.prepare(batch, epoch) for batch in batches]
        # Known from masks alone, so the sum over ranks precedes the first forward.
        num_scored = torch.stack([self.draft.count_scored(batch) for batch in ready]).sum(0)
        weights = self.loss_weights / self.ranks.sum(num_scored).clamp(min=1)
        for batch in ready:
            sums = self.draft(batch, weights)
            sums.loss.backward()
            self.log.add(sums, batch)
        self.lr = learning_rate(
            self.state.step,
            peak=self.settings.optimizer.lr,
            total_steps=self.total_steps,
            settings=self.settings.schedule,
        )
        self.grad_norm = self.optimizer.step(self.lr)
        step, step_in_epoch = self.state.step + 1, self.state.step_in_epoch + 1
        self.state = replace(self.state, step=step, step_in_epoch=step_in_epoch)
        self.is_saved = False
        if self.is_log_due(epoch):
            self.log_step(epoch)

    def log_step(self, epoch: int) -> None:
        """Tell of the steps since the last one that was logged; stop a run that diverged."""
        self.logged_step = self.state.step
        self.log.log_step(
            self.state.step,
            epoch,
            lr=self.lr,
            grad_norm=self.grad_norm,
            skipped=int(self.optimizer.num_skipped),
            wait_seconds=self.feed.take_wait_seconds(),
        )
        self.check_gradients()

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """Cast a training batch, leave out broken documents, add noise."""
        std, seed = self.settings.data.noise_std, self.settings.run.seed
        ready, is_broken = drop_and_add_noise(
            batch.cast(self.compute_dtype), std, seed=seed, epoch=epoch
        )
        self.log.add_broken(batch.sample_ids, is_broken)
        return ready

    @torch.no_grad()
    def validate(self) -> Metrics | None:
        """All metrics over the validation samples; None if there are none.

        Raises:
            Interrupted: A signal came; all ranks leave at the same batch.
        """
        if self.validation_loader is None:
            return None
        self.draft.eval()
        sums = MetricSums.of(self.draft)
        for (batch,) in self.feed.steps(self.validation_loader.epoch(0)):
            finite, _ = drop_non_finite(batch.cast(self.compute_dtype))
            sums.add(self.draft(finite), finite)
            self.leave_if_asked()
        self.feed.take_wait_seconds()
        return sums.reduce(self.ranks)

    def finish_epoch(self, epoch: int) -> None:
        """Validate and save a finished epoch."""
        with self.between_steps():
            metrics = self.validate()
        name = str(epoch)
        is_best = metrics is None or self.is_better(metrics)
        best = self.state.best
        if is_best:
            best = {"name": name, **{key: (metrics or {}).get(key) for key in BEST_KEYS}}
        known = {name: x for name, x in (metrics or {}).items() if x is not None and isfinite(x)}
        self.state = replace(self.state, epoch=epoch + 1, step_in_epoch=0, best=best, metrics=known)
        if metrics is not None:
            self.log.log_validation(self.state.step, epoch, metrics, is_best=is_best)
        self.save(name)

    def is_better(self, metrics: Metrics) -> bool:
        """Whether a validation beats the best one so far.

        By simulated acceptance length, if the algorithm has one; of equal ones, as at the start of
        a run, by the loss. One without a loss, or whose loss is not finite, never does.
        """
        rank, best_rank = _rank(metrics), _rank(self.state.best or {})
        return rank is not None and (best_rank is None or rank > best_rank)

    def save(self, name: str) -> None:
        """Save a checkpoint; every rank waits until it is committed."""
        weights = gather_weights(self.draft)
        moments = gather_moments(self.draft, self.optimizer.adamw)
        if self.folder is not None:
            self.folder.save(
                name,
                tensors={**self.draft.frozen_tensors(), **weights},
                config=self.draft.config.to_json(),
                trainer_tensors=moments,
                state=replace(self.state, num_skipped_steps=int(self.optimizer.num_skipped)),
            )
            if self.state.best is not None:
                self.folder.set_best(self.state.best["name"])
            self.folder.prune(self.settings.checkpoints.keep_checkpoints)
        self.ranks.barrier()
        self.is_saved = True

    def leave_if_asked(self) -> None:
        """Leave if a stop signal reached any rank; all ranks must call.

        Raises:
            Interrupted: One did.
        """
        number = int(self.ranks.max(self.signals.received))
        if number:
            raise Interrupted(number)

    def stop(self, number: int) -> NoReturn:
        """Log and save what is not logged and saved yet, and end the run.

        Raises:
            StoppedError: The state is saved.
            Interrupted: There is none before the first step.
        """
        if self.state.step == 0:
            raise Interrupted(number)
        if self.logged_step < self.state.step:
            self.log_step(self.state.epoch)
        name = f"step-{self.state.step}"
        if not self.is_saved:
            self.save(name)
        elif self.folder is not None and self.folder.latest is not None:
            name = self.folder.latest.folder.name
        raise StoppedError(
            f"Stopped by signal {number} after step {self.state.step:,}, saved as `{name}`",
            signal_number=number,
            hint="Run the same command again to go on",
        )

    def check_gradients(self) -> None:
        """Stop a run whose gradients were not finite for too many steps in a row."""
        in_a_row = int(self.optimizer.most_skipped_in_a_row)
        if in_a_row >= self.settings.optimizer.max_skipped_steps:
            raise DivergedError(
                f"Training diverged: {in_a_row} steps in a row had no finite gradient, "
                f"up to step {self.state.step:,}",
                hint="Lower `--lr`, or check the samples for extreme hidden states",
            )

    def is_log_due(self, epoch: int) -> bool:
        """Whether the step just done is logged: regular ones, the first, an epoch's last."""
        step, last = self.state.step, self.loader.steps_in(epoch)
        is_last = step == self.total_steps or self.state.step_in_epoch == last
        return is_last or step == 1 or step % self.settings.run.log_every_steps == 0

    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is saved in the middle of the epoch, after the step just done."""
        every = self.settings.checkpoints.checkpoint_every_steps
        return every is not None and self.state.step % every == 0 and not self.is_epoch_whole


BEST_KEYS = ("acceptance_length", "loss")


def _rank(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """What validations are compared by; None: it measures nothing, or something not finite."""
    length, loss = metrics.get("acceptance_length"), metrics.get("loss")
    if loss is None or not are_finite(loss, 0.0 if length is None else length):
        return None
    return (0.0 if length is None else length, -loss)
