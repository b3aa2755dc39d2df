"""How long work tells its caller where it is; the core itself never prints."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from speculators_cli.core.errors import SpeculatorsError


@dataclass(frozen=True)
class StepReport:
    """One log step of training. Losses are in nats per supervised token."""

    step: int  # optimizer steps done, from 1
    total_steps: int
    epoch: int  # from 0, as the checkpoint folders are named
    num_epochs: int
    loss: float | None  # None where no position was scored
    acceptance_length: float | None  # simulated
    lr: float
    tokens_per_second: float  # over all ranks
    seconds_left: float


@dataclass(frozen=True)
class ValidationReport:
    """The validation at the end of an epoch."""

    epoch: int
    num_epochs: int
    loss: float  # nats per supervised token
    acceptance_length: float | None  # simulated
    is_best: bool


class Task(Protocol):
    """A piece of work with a known number of parts."""

    def advance(self, num_done: int = 1) -> None:
        """Say that `num_done` more parts are done."""


class Progress(Protocol):
    """Receives what long work has to say while it runs."""

    def info(self, message: str) -> None:
        """Tell a fact worth a line."""

    def warn(self, message: str, *, hint: str | None = None) -> None:
        """Tell of something that does not stop the work but that the user should know."""

    def error(self, error: SpeculatorsError) -> None:
        """Tell of what ends the process, where nobody can catch it."""

    def task(
        self, description: str, total: int, *, is_bytes: bool = False
    ) -> AbstractContextManager[Task]:
        """Open a piece of work of `total` parts, such as files, or bytes."""

    def trained(self, report: StepReport) -> None:
        """Show a log step of training."""

    def validated(self, report: ValidationReport) -> None:
        """Show the validation at the end of an epoch."""


class _SilentTask:
    def advance(self, num_done: int = 1) -> None:
        pass


class SilentProgress:
    """Says nothing: for ranks other than the first, and for use as a library."""

    def info(self, message: str) -> None:
        """Ignore the fact."""

    def warn(self, message: str, *, hint: str | None = None) -> None:
        """Ignore the warning."""

    def error(self, error: SpeculatorsError) -> None:
        """Ignore the error: the exit code is left."""

    @contextmanager
    def task(
        self,
        description: str,  # noqa: ARG002
        total: int,  # noqa: ARG002
        *,
        is_bytes: bool = False,  # noqa: ARG002
    ) -> Iterator[Task]:
        """Open a piece of work that nobody watches."""
        yield _SilentTask()

    def trained(self, report: StepReport) -> None:
        """Ignore the log step."""

    def validated(self, report: ValidationReport) -> None:
        """Ignore the validation."""


SILENT = SilentProgress()
