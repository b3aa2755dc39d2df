"""Progress reports of long work to its caller; the core itself never prints."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from speculators_cli.core.errors import SpeculatorsError


@dataclass(frozen=True)
class StepReport:
    """One log step of training; its loss is defined as in `TrainReport`."""

    step: int  # optimizer steps done, from 1
    total_steps: int
    epoch: int  # from 0, as in the names of checkpoint folders
    num_epochs: int
    loss: float | None  # None if no position was scored
    acceptance_length: float | None  # simulated
    lr: float
    tokens_per_second: float  # over all ranks
    seconds_left: float


@dataclass(frozen=True)
class ValidationReport:
    """Results of the validation at the end of an epoch, and of the evaluation on prompts."""

    epoch: int
    num_epochs: int
    loss: float | None  # as in `TrainReport`; None without validation
    acceptance_length: float | None  # simulated
    is_best: bool
    evaluated_acceptance_length: float | None = None  # None without prompts


class Task(Protocol):
    """A unit of work with a known number of parts."""

    def advance(self, num_done: int = 1) -> None:
        """Report `num_done` more completed parts."""


class Progress(Protocol):
    """Receives progress reports of long work."""

    def info(self, message: str) -> None:
        """Report one line of information."""

    def warn(self, message: str, *, hint: str | None = None) -> None:
        """Report a warning; the work continues."""

    def error(self, error: SpeculatorsError) -> None:
        """Report the error that ends the process, where no caller can catch it."""

    def task(
        self, description: str, total: int, *, is_bytes: bool = False
    ) -> AbstractContextManager[Task]:
        """Start a task of `total` parts, such as files or bytes."""

    def trained(self, report: StepReport) -> None:
        """Report a log step of training."""

    def validated(self, report: ValidationReport) -> None:
        """Report the validation at the end of an epoch."""


class _SilentTask:
    def advance(self, num_done: int = 1) -> None:
        pass


class SilentProgress:
    """No output: for ranks other than the first, and for use as a library."""

    def info(self, message: str) -> None:
        """Ignore the information."""

    def warn(self, message: str, *, hint: str | None = None) -> None:
        """Ignore the warning."""

    def error(self, error: SpeculatorsError) -> None:
        """Ignore the error: the exit code remains."""

    @contextmanager
    def task(
        self,
        description: str,  # noqa: ARG002
        total: int,  # noqa: ARG002
        *,
        is_bytes: bool = False,  # noqa: ARG002
    ) -> Iterator[Task]:
        """Start a task without output."""
        yield _SilentTask()

    def trained(self, report: StepReport) -> None:
        """Ignore the log step."""

    def validated(self, report: ValidationReport) -> None:
        """Ignore the validation."""


SILENT = SilentProgress()
