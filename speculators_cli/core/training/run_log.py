"""Reports of a run while it trains: log steps, validations, broken samples, throughput."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import DraftModel, StepSums
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.errors import MachineError
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.progress import Progress, StepReport, ValidationReport
from speculators_cli.core.training.best import EVALUATED, count_epochs_since_best
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.loggers import SafeLogger
from speculators_cli.core.training.metrics import Metrics, MetricSums
from speculators_cli.core.training.start_up import StartUp

# Most broken samples reported at one log step, and shared with other ranks in one message.
MAX_NAMED = 16
SHARED_AT_ONCE = 16
# Fraction of the time spent waiting for data above which a warning is given, and the shortest time
# it is measured over: prefetching takes a moment to start.
MAX_WAIT_SHARE = 0.05
WATCHED_SECONDS = 10.0
# Documents with hidden states that are not finite, when the verifier computes them.
MAX_BROKEN_SHARE = 0.01  # between two log steps, if they are as many as the next number
MAX_IN_A_ROW = 10


class WaitWatch:
    """Adds up the time spent waiting for data, until a single warning is due."""

    def __init__(self) -> None:
        self.waited, self.watched, self.has_warned = 0.0, 0.0, False

    def add(self, waited: float, seconds: float) -> float | None:
        """Add a time span and how much of it was waiting; returns the fraction to warn about."""
        self.waited += waited
        self.watched += seconds
        if self.watched < WATCHED_SECONDS or self.has_warned:
            return None
        share = self.waited / self.watched
        self.waited, self.watched = 0.0, 0.0
        self.has_warned = share > MAX_WAIT_SHARE
        return share if self.has_warned else None


class NonFiniteWatch:
    """Finds out that a verifier computes hidden states that are not finite, for many documents.

    Such documents are left out. A few are tolerated: float16 overflows at rare tokens.
    """

    def __init__(self) -> None:
        self.in_a_row = 0  # documents of this rank, up to the last one

    def check(self, are_broken: Sequence[bool], ranks: Ranks) -> MachineError | None:
        """Return the error that ends the run, the same on all ranks, which must all call.

        Args:
            are_broken: Of the documents since the last call, in order.
            ranks: The processes of the run.
        """
        longest = self.in_a_row
        for is_broken in are_broken:
            self.in_a_row = self.in_a_row + 1 if is_broken else 0
            longest = max(longest, self.in_a_row)
        counts = torch.tensor([sum(are_broken), len(are_broken)], dtype=torch.int64)
        num_broken, num_all = ranks.sum(counts).tolist()
        is_many = num_broken >= MAX_IN_A_ROW and num_broken > MAX_BROKEN_SHARE * num_all
        if not is_many and ranks.max(longest) < MAX_IN_A_ROW:
            return None
        return MachineError(
            f"The verifier computed hidden states that are not finite for {num_broken:,} of the "
            f"last {num_all:,} documents; the run is saved without them",
            hint="Pass `--capture-dtype bfloat16` or `--capture-dtype float32`: float16 overflows "
            "in many verifiers",
        )


class RunLog:
    """Accumulates steps on the device and reports them at log steps.

    Args:
        ranks: The processes of the run, connected.
        samples: The training samples, for the paths of broken ones.
        draft: The draft being trained.
        num_epochs: Epochs of the run.
        total_steps: Optimizer steps of the run.
        logger: Receives the metrics; None on other ranks and in a dry run.
        progress: Reports progress.
        start_up: Timer of the start, which ends with the first log step.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        samples: SampleSource,
        draft: DraftModel,
        num_epochs: int,
        total_steps: int,
        logger: SafeLogger | None,
        progress: Progress,
        start_up: StartUp,
    ) -> None:
        self.ranks = ranks
        self.samples = samples
        self.draft = draft
        self.num_epochs = num_epochs
        self.total_steps = total_steps
        self.logger = logger
        self.progress = progress
        self.start_up = start_up
        self.is_started = False
        self.sums = MetricSums.of(draft)
        self.waits = WaitWatch()
        self.broken: list[tuple[tuple[int, ...], Tensor]] = []
        self.clock, self.clock_step = time.perf_counter(), 0
        self.num_tokens, self.seconds = 0.0, 0.0
        self.broken_ids: set[int] = set()  # samples skipped so far, on any rank
        self.captured_seconds: float | None = None  # of `seconds`
        self.live = NonFiniteWatch() if samples.is_live else None
        self.problem: MachineError | None = None  # ends the run, the same on all ranks

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second, over all ranks; time spent elsewhere is excluded."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def capture_share(self) -> float | None:
        """Fraction of the time spent computing hidden states; None if they are stored."""
        if self.captured_seconds is None or not self.seconds:
            return None
        return self.captured_seconds / self.seconds

    @property
    def num_broken_samples(self) -> int:
        """Samples that were skipped because of their contents, each counted once."""
        return len(self.broken_ids)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the measured time, after the device has finished its steps."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        began_at = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began_at

    def start_clock(self, step: int) -> None:
        """Start measuring throughput, after `step` steps."""
        self.clock, self.clock_step = time.perf_counter(), step

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Add the sums of one batch."""
        self.sums.add(sums, batch)

    def add_broken(self, sample_ids: tuple[int, ...], is_broken: Tensor) -> None:
        """Record which documents of a batch were skipped; read at the next log step."""
        self.broken.append((sample_ids, is_broken))

    def log_step(
        self,
        step: int,
        epoch: int,
        *,
        lr: float,
        grad_norm: Tensor,
        skipped: int,
        wait_seconds: float,
        capture_seconds: float | None = None,
    ) -> None:
        """Reduce the sums since the last log step and report them. All ranks must call."""
        metrics = self.sums.reduce(self.ranks)
        self.sums = MetricSums.of(self.draft)
        now = time.perf_counter()
        seconds, steps = max(now - self.clock, 1e-9), max(step - self.clock_step, 1)
        self.clock, self.clock_step = now, step
        tokens = metrics.pop("tokens") or 0.0
        self.num_tokens += tokens
        self.seconds += seconds
        self._name_broken()
        wait_share = self.ranks.max(wait_seconds / seconds)
        metrics |= {
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_second": tokens / seconds,
            "num_skipped_steps": skipped,
            "num_broken_samples": self.num_broken_samples,
            "data_wait_share": wait_share,
        }
        if capture_seconds is not None:
            self.captured_seconds = (self.captured_seconds or 0.0) + capture_seconds
            metrics["capture_share"] = self.ranks.max(capture_seconds / seconds)
        # Reading the first samples is always slow.
        if step > 1:
            self._warn_of_waiting(step, wait_share * seconds, seconds)
        self._log("train", step, epoch, metrics)
        self.progress.trained(
            StepReport(
                step=step,
                total_steps=self.total_steps,
                epoch=epoch,
                num_epochs=self.num_epochs,
                loss=metrics["loss"],
                acceptance_length=metrics["acceptance_length"],
                lr=lr,
                tokens_per_second=tokens / seconds,
                seconds_left=(self.total_steps - step) * seconds / steps,
            )
        )
        if not self.is_started:
            self.is_started = True
            self.start_up.end("first step")
            self.progress.info(self.start_up.describe())

    def log_validation(self, step: int, epoch: int, metrics: Metrics, *, is_best: bool) -> None:
        """Report a validation, and warn about one without metrics."""
        self._log("val", step, epoch, metrics)
        self._warn_of_validation(epoch, metrics)
        if metrics.get("loss") is None and metrics.get(EVALUATED) is None:
            return
        self.progress.validated(
            ValidationReport(
                epoch=epoch,
                num_epochs=self.num_epochs,
                loss=metrics.get("loss"),
                acceptance_length=metrics.get("acceptance_length"),
                is_best=is_best,
                evaluated_acceptance_length=metrics.get(EVALUATED),
            )
        )

    def note_early_stop(self, state: TrainState) -> None:
        """Report that training stops before its last epoch."""
        best = "no epoch" if state.best is None else f"epoch {int(state.best['name']) + 1}"
        self.progress.info(
            f"Stopping after epoch {state.epoch}: none of the last "
            f"{count_epochs_since_best(state)} was better than {best}"
        )

    def _warn_of_validation(self, epoch: int, metrics: Metrics) -> None:
        if EVALUATED in metrics and metrics[EVALUATED] is None:
            self.progress.warn(
                f"The evaluation of epoch {epoch + 1} has no metrics: every answer ends with its "
                "first token",
                hint="Pass other prompts as `--evaluate-prompts`",
            )
        if "loss" not in metrics:
            return
        loss = metrics["loss"]
        if loss is None:
            self.progress.warn(
                f"The validation of epoch {epoch + 1} has no metrics: no validation sample has a "
                "supervised position",
                hint="Pass validation samples that have supervised tokens as `--val-data-path`",
            )
            return
        if not math.isfinite(loss):
            self.progress.warn(
                f"The validation loss of epoch {epoch + 1} is not finite, so the epoch is not "
                "compared with the best one",
                hint="Lower `--lr`, and start from an earlier checkpoint with `--from-checkpoint`",
            )

    def _log(self, split: str, step: int, epoch: int, metrics: Metrics) -> None:
        if self.logger is not None:
            self.logger.log(step, split, {"epoch": epoch, **metrics})

    def _warn_of_waiting(self, step: int, waited: float, seconds: float) -> None:
        share = self.waits.add(waited, seconds)
        if share is not None:
            self.progress.warn(
                f"{share:.0%} of the time up to step {step:,} was spent waiting for data",
                hint="Raise `--num-workers`, or put the samples on a faster disk",
            )

    def _name_broken(self) -> None:
        """Warn about samples whose hidden states are not finite, found on any rank."""
        found = [(ids, is_broken.tolist()) for ids, is_broken in self.broken]
        own = {i for ids, flags in found for i, is_bad in zip(ids, flags, strict=True) if is_bad}
        if self.live is not None:
            self.problem = self.live.check([x for _, flags in found for x in flags], self.ranks)
        self.broken.clear()
        new, num_named = sorted(own - self.broken_ids), 0
        for share in range(int(self.ranks.max(math.ceil(len(new) / SHARED_AT_ONCE)))):
            # One row per rank; ids are offset by 1, and 0 means empty.
            ids = torch.zeros(self.ranks.num_ranks, SHARED_AT_ONCE, dtype=torch.int64)
            some = new[share * SHARED_AT_ONCE : (share + 1) * SHARED_AT_ONCE]
            ids[self.ranks.rank, : len(some)] = torch.tensor(some, dtype=torch.int64) + 1
            for sample_id in self.ranks.sum(ids).flatten().tolist():
                if sample_id == 0 or sample_id - 1 in self.broken_ids:
                    continue
                self.broken_ids.add(sample_id - 1)
                num_named += 1
                if num_named <= MAX_NAMED:
                    file = self.samples.path(sample_id - 1)
                    self.progress.warn(f"Skipped `{file}`: its hidden states are not all finite")
