"""Trainer: the training loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import NoReturn

import torch

from speculators_cli.core.data.batch import Batch, drop_non_finite
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.errors import DivergedError, StoppedError
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.signals import Interrupted, StopSignals
from speculators_cli.core.training.best import (
    count_epochs_since_best,
    describe_best,
    is_better,
)
from speculators_cli.core.training.feed import DeviceFeed, StepBatches
from speculators_cli.core.training.metrics import Metrics, MetricSums
from speculators_cli.core.training.optimizer_step import OptimizerStep
from speculators_cli.core.training.prompt_evaluation import PromptEvaluation
from speculators_cli.core.training.run_log import RunLog
from speculators_cli.core.training.saver import Saver


@dataclass
class Trainer:
    """Trains a draft model from a state to the last step."""

    optimizer_step: OptimizerStep
    rate: Callable[[int], float]  # learning rate by number of finished steps
    loader: BatchSource  # training batches of this rank
    validation_loader: BatchSource | None  # None without validation
    state: TrainState
    num_epochs: int
    total_steps: int  # optimizer steps of the whole run
    log_every_steps: int
    max_skipped_steps: int  # in a row
    checkpoint_every_steps: int | None  # None: only after each epoch
    saver: Saver
    log: RunLog
    patience: int | None = None  # epochs without a better one after which training stops
    evaluation: PromptEvaluation | None = None  # on prompts, after each epoch
    signals: StopSignals = field(default_factory=StopSignals)  # open
    is_saved: bool = False  # whether a checkpoint holds this state, complete or being written

    def __post_init__(self) -> None:
        self.logged_step = self.state.step
        self.lr, self.grad_norm = 0.0, torch.zeros(())  # of the last step
        self.draft, self.ranks = self.optimizer_step.draft, self.optimizer_step.ranks
        self.optimizer = self.optimizer_step.optimizer
        self.filler = self.optimizer_step.filler
        self.feed = DeviceFeed(self.ranks.device)

    def close(self) -> None:
        """Stop reading samples, in every case, and finish writing what was computed."""
        self.loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()
        self.filler.close()
        self.saver.close()

    @property
    def is_epoch_whole(self) -> bool:
        """Whether all steps of the epoch are done, before it is validated and saved."""
        return self.state.step_in_epoch == self.loader.steps_in(self.state.epoch)

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete, including validation and checkpoint of the last epoch."""
        is_done = self.state.step >= self.total_steps and not self.is_epoch_whole
        return is_done or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """Whether the last epochs brought no better one; told from the state, so also resumed."""
        if self.patience is None or self.state.step_in_epoch or self.state.step == 0:
            return False
        return count_epochs_since_best(self.state) >= self.patience

    def fit(self) -> None:
        """Train from the current step to the last one; a signal saves a checkpoint.

        Raises:
            StoppedError: A signal arrived.
        """
        self.signals.defer()
        self.saver.prepare(self.optimizer_step.weights)
        try:
            self.train_epochs()
            self.saver.wait()
        except Interrupted as stop:
            self.stop(stop.signal_number)

    def train_epochs(self) -> None:
        """Train to the last step, epoch by epoch."""
        while self.state.epoch < self.num_epochs:
            self.train_epoch()
            if not self.is_epoch_whole:
                self.save(f"step-{self.state.step}")
                return
            self.finish_epoch()
            if self.state.step >= self.total_steps or self.is_stopped_early:
                return

    def train_epoch(self) -> None:
        """Train through the rest of an epoch, or up to the last step."""
        self.draft.train()
        self.log.start_clock(self.state.step)
        steps = self.feed.steps(self.loader.epoch(self.state.epoch, self.state.step_in_epoch))
        while (batches := self.take(steps)) is not None:
            self.train_step(batches)
            self.saver.check()
            self.leave_if_broken()
            self.leave_if_asked()
            if self.state.step == self.total_steps:
                return
            if self.is_checkpoint_due():
                with self.log.paused():
                    self.save(f"step-{self.state.step}")

    def take(self, steps: Iterator[StepBatches]) -> StepBatches | None:
        """The batches of the next step, None at the end.

        Raises:
            Interrupted: A signal arrived while waiting for them.
        """
        with self.between_steps():
            return next(steps, None)

    def between_steps(self) -> AbstractContextManager[None]:
        """Lets a single process stop at any line; several ranks stop together, after a step."""
        return self.signals.interruptible() if self.ranks.num_ranks == 1 else nullcontext()

    def train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over this rank's packed sequences, which are on the device."""
        self.lr = self.rate(self.state.step)
        self.grad_norm = self.optimizer_step.run(
            batches, self.log, epoch=self.state.epoch, lr=self.lr
        )
        step, step_in_epoch = self.state.step + 1, self.state.step_in_epoch + 1
        self.state = replace(self.state, step=step, step_in_epoch=step_in_epoch)
        self.is_saved = False
        if self.is_log_due():
            self.log_step()

    def log_step(self) -> None:
        """Report the steps since the last log step; stop a run that diverged."""
        self.logged_step = self.state.step
        self.log.log_step(
            self.state.step,
            self.state.epoch,
            lr=self.lr,
            grad_norm=self.grad_norm,
            skipped=int(self.optimizer.num_skipped),
            wait_seconds=self.feed.take_wait_seconds(),
            capture_seconds=self.filler.take_seconds(),
        )
        self.check_gradients()

    @torch.no_grad()
    def validate(self) -> Metrics | None:
        """All metrics over the validation samples; None if there are none.

        Raises:
            Interrupted: A signal arrived; all ranks stop at the same batch.
        """
        if self.validation_loader is None:
            return None
        self.draft.eval()
        sums = MetricSums.of(self.draft)
        with self.draft.verifier.whole():
            for (batch,) in self.feed.steps(self.validation_loader.epoch(0)):
                filled = self.filler.fill(batch).cast(self.optimizer_step.compute_dtype)
                finite, _ = drop_non_finite(filled)
                # The same positions after each epoch, so that their losses compare.
                seed = self.optimizer_step.seed
                drawn = self.draft.draw(finite, seed=seed, epoch=VALIDATION_EPOCH)
                sums.add(self.draft(drawn), drawn)
                self.leave_if_asked()
        self.feed.take_wait_seconds()
        self.filler.take_seconds()
        return sums.reduce(self.ranks)

    def evaluate(self) -> Metrics | None:
        """Metrics over prompts; None without prompts.

        Raises:
            Interrupted: A signal arrived; all ranks stop after their prompts.
        """
        if self.evaluation is None:
            return None
        metrics = self.evaluation.run()
        self.leave_if_asked()
        return metrics

    def finish_epoch(self) -> None:
        """Validate, evaluate and save a finished epoch."""
        epoch = self.state.epoch
        with self.between_steps():
            found = [x for x in (self.validate(), self.evaluate()) if x is not None]
        metrics = {name: value for part in found for name, value in part.items()}
        by_prompts = self.evaluation is not None
        is_best = not metrics or is_better(metrics, self.state.best, by_prompts=by_prompts)
        best = describe_best(epoch, metrics) if is_best else self.state.best
        known = {name: x for name, x in metrics.items() if x is not None and isfinite(x)}
        self.state = replace(self.state, epoch=epoch + 1, step_in_epoch=0, best=best, metrics=known)
        if metrics:
            self.log.log_validation(self.state.step, epoch, metrics, is_best=is_best)
        self.save(str(epoch))
        if self.is_stopped_early and self.state.step < self.total_steps:
            self.log.note_early_stop(self.state)

    def save(self, name: str) -> None:
        """Start to save a checkpoint; training goes on once its state is copied."""
        self.saver.save(name, self.optimizer_step.weights, self.optimizer, self.state)
        self.is_saved = True

    def leave_if_asked(self) -> None:
        """Stop if any rank received a stop signal; all ranks must call.

        Raises:
            Interrupted: A rank received one.
        """
        number = int(self.ranks.max(self.signals.received))
        if number:
            raise Interrupted(number)

    def leave_if_broken(self) -> None:
        """Save and stop where the verifier computes states that are not finite; all ranks agree.

        Raises:
            MachineError: It does, for too many documents.
        """
        problem = self.log.problem
        if problem is not None:
            self.save(f"step-{self.state.step}")
            self.saver.wait()
            raise problem

    def stop(self, number: int) -> NoReturn:
        """Log and save the current state if it is not yet, and end the run.

        Raises:
            StoppedError: The state is saved.
            Interrupted: There is no state to save before the first step.
        """
        if self.state.step == 0:
            raise Interrupted(number)
        if self.logged_step < self.state.step:
            self.log_step()
        name = f"step-{self.state.step}"
        if not self.is_saved:
            self.save(name)
        self.saver.wait()
        if self.saver.folder is not None and self.saver.folder.latest is not None:
            name = self.saver.folder.latest.folder.name
        raise StoppedError(
            f"Stopped by signal {number} after step {self.state.step:,}, saved as `{name}`",
            signal_number=number,
            hint="Rerun the same command to resume",
        )

    def check_gradients(self) -> None:
        """Stop a run whose gradients were not finite for too many consecutive steps."""
        in_a_row = int(self.optimizer.most_skipped_in_a_row)
        if in_a_row >= self.max_skipped_steps:
            raise DivergedError(
                f"Training diverged: {in_a_row} steps in a row without a finite gradient, "
                f"up to step {self.state.step:,}",
                hint="Lower `--lr`, or check the samples for extreme hidden states",
            )

    def is_log_due(self) -> bool:
        """Whether the current step is logged: every N steps, the first, the last of an epoch."""
        step, last = self.state.step, self.loader.steps_in(self.state.epoch)
        is_last = step == self.total_steps or self.state.step_in_epoch == last
        return is_last or step == 1 or step % self.log_every_steps == 0

    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due in the middle of an epoch, after the current step."""
        every = self.checkpoint_every_steps
        return every is not None and self.state.step % every == 0 and not self.is_epoch_whole


VALIDATION_EPOCH = -1  # for draws: that of no training epoch
