"""Errors that a user can act on, and their exit codes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class SpeculatorsError(Exception):
    """A problem that the user can act on.

    Args:
        message: What is wrong, with the value and where it came from.
        hint: How to fix it; starts with a verb.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SettingsError(SpeculatorsError):
    """Flags, settings or paths cannot be used; nothing was started or written."""

    exit_code = 2


class DataError(SpeculatorsError):
    """The samples cannot be used."""

    exit_code = 3


class CheckpointError(SpeculatorsError):
    """A checkpoint cannot be used or written."""

    exit_code = 4


class ExportError(SpeculatorsError):
    """A draft cannot be exported, or its export differs from the trained draft."""

    exit_code = 4


class MachineError(SpeculatorsError):
    """The environment prevents the command: disk, memory, device, hub, a missing package."""

    exit_code = 5


class DivergedError(SpeculatorsError):
    """Training diverged."""

    exit_code = 6


class StoppedError(SpeculatorsError):
    """A signal stopped the command; a training run saved its state first.

    Args:
        message: What was saved, and where.
        signal_number: The signal that was received.
        hint: How to resume.
    """

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def unexpected(error: Exception) -> SpeculatorsError:
    """Wrap a bug as an error for the user."""
    return SpeculatorsError(
        f"Unexpected {type(error).__name__}: {error}",
        hint="Rerun with `--verbose` and report the traceback",
    )


@contextmanager
def rewording(
    words: Mapping[str, str], *, of: type[SpeculatorsError] = SpeculatorsError
) -> Iterator[None]:
    """Replace words in the errors of a block, such as flags that another command calls otherwise.

    Args:
        words: The words, and what stands in their place.
        of: The errors in which they are replaced.
    """
    try:
        yield
    except of as error:
        for word, other in words.items():
            error.message = error.message.replace(word, other)
            error.hint = error.hint and error.hint.replace(word, other)
        error.args = (error.message,)
        raise
