"""Records how a run ended, in every case: torchrun hides the exit code."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from speculators_cli.core.errors import (
    CheckpointError,
    DataError,
    SettingsError,
    SpeculatorsError,
    StoppedError,
    unexpected,
)
from speculators_cli.core.files import locking, replacing, write_json
from speculators_cli.core.signals import Interrupted
from speculators_cli.core.training.save_path import LOCK_NAME, RESULT_NAME


@contextmanager
def recording_end(write: Callable[[SpeculatorsError], None]) -> Iterator[None]:
    """Record the error that ends the block; a failure to write does not hide it.

    Raises:
        StoppedError: A signal arrived while there was nothing to save.
    """
    try:
        yield
    except Interrupted as stop:
        stopped = StoppedError(
            f"Stopped by signal {stop.signal_number}; there was nothing to save yet",
            signal_number=stop.signal_number,
            hint="Rerun the same command to start over",
        )
        with suppress(OSError, SpeculatorsError):
            write(stopped)
        raise stopped from None
    except Exception as error:
        known = error if isinstance(error, SpeculatorsError) else unexpected(error)
        with suppress(OSError, SpeculatorsError):
            write(known)
        raise


class RunEnd:
    """The end of a run in its save path.

    Args:
        save_path: Created for the record, unless the settings or inputs ended the run.
    """

    def __init__(self, save_path: Path) -> None:
        self.save_path = save_path
        self.is_begun = False  # whether the run has locked its save path before
        self.is_locked = False  # whether it is locked now

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The save path is locked within the block; the record of an earlier run is removed."""
        self.is_begun = self.is_locked = True
        (self.save_path / RESULT_NAME).unlink(missing_ok=True)
        try:
            yield
        finally:
            self.is_locked = False

    def write(self, error: SpeculatorsError) -> None:
        """Write the error that ended the run, unless another run has locked the save path."""
        if not self.is_begun:
            if isinstance(error, SettingsError):
                return
            if isinstance(error, DataError | CheckpointError) and not self.save_path.exists():
                return
            self.save_path.mkdir(parents=True, exist_ok=True)
        lock = locking(self.save_path / LOCK_NAME, in_use=lambda _: error)
        with (
            nullcontext() if self.is_locked else lock,
            replacing(self.save_path / RESULT_NAME) as temporary,
        ):
            write_json(error_record(error), temporary)


def error_record(error: SpeculatorsError) -> Mapping[str, Any]:
    """The error as fields of the record."""
    return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
