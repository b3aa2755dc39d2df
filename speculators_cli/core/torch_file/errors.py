"""Errors of files that are read as data."""

from pathlib import Path


class TorchFileError(Exception):
    """A file that is not a usable `.pt` file.

    Args:
        reason: What is wrong with it, as the end of a sentence that begins with the file.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ChangedFileError(TorchFileError):
    """An open file that has changed since it was opened."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(reason)
        self.file = file
