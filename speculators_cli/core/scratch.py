"""Scratch folders for incomplete files, identified by a marker file.

A name identifies nothing: leftovers of a killed process are removed only from a folder with the
marker, which is written before everything else and removed last.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from speculators_cli.core.errors import SettingsError, SpeculatorsError
from speculators_cli.core.files import disk_errors, locking, sync

MARK_NAME = "made-by"
MARK = b"speculators-cli: what is not whole yet; removed by the next run\n"
LOCK_NAME = "lock"


class Scratch:
    """A folder for incomplete files; created when needed, removed when empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a file or folder of this name."""
        return os.path.lexists(self.folder)

    @property
    def is_own(self) -> bool:
        """Whether the folder has the marker, or is empty."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return False
        names = [path.name for path in self.folder.iterdir()]
        mark = self.folder / MARK_NAME
        if MARK_NAME not in names or mark.is_symlink() or not mark.is_file():
            return not names
        content = mark.read_bytes()
        # A kill during the write of the marker leaves a part of it, and no other file.
        return content == MARK or (len(names) == 1 and MARK.startswith(content))

    def check(self, make_error: Callable[[Path], SpeculatorsError]) -> None:
        """Raise an error for a folder of this name without the marker."""
        if self.exists and not self.is_own:
            raise make_error(self.folder)

    def open(self) -> Path:
        """Create and mark the folder; `check` has passed."""
        self.folder.mkdir(exist_ok=True)
        mark = self.folder / MARK_NAME
        if not mark.exists() or mark.read_bytes() != MARK:
            try:
                mark.write_bytes(MARK)
            except OSError:  # a full disk
                with suppress(OSError):
                    mark.unlink()
                    self.folder.rmdir()
                raise
        return self.folder

    def clear(self) -> None:
        """Remove everything in the folder, then its marker, then the folder."""
        if not self.exists or not self.is_own:
            return
        for path in self.folder.iterdir():
            if path.name != MARK_NAME:
                remove(path)
        if {path.name for path in self.folder.iterdir()} <= {MARK_NAME}:
            (self.folder / MARK_NAME).unlink(missing_ok=True)
            with suppress(OSError):  # another process is waiting to use it
                self.folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, as far as permissions allow."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, *, flag: str) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `folder` atomically after the block.

    Leftovers of a killed process are removed, and a folder that it had moved away is restored.

    Args:
        folder: May be missing, with any of its parents. Its content is removed: the caller has
            checked that it may be.
        flag: The flag it was passed with.

    Raises:
        SettingsError: Another process is writing it, or the path for incomplete files is in use.
        MachineError: The disk is full.
    """
    folder = folder.absolute()
    scratch = Scratch(folder.with_name(f".speculators-{folder.name}"))
    scratch.check(
        lambda path: SettingsError(
            f"`{flag}`: `{path}` is needed to write `{folder}`, but has other files",
            hint=f"Move `{path}` elsewhere, or choose another folder",
        )
    )

    def in_use(holder: str) -> SettingsError:
        return SettingsError(
            f"`{flag}`: `{folder}` is being written by {holder}",
            hint="Wait for it to end, or choose another folder",
        )

    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.open()
        try:
            with locking(scratch.folder / LOCK_NAME, in_use=in_use) as lock:
                scratch.open()  # again: the last holder may have removed the marker in the meantime
                lock.write()
                try:
                    with _swapping(folder, scratch) as new:
                        yield new
                finally:
                    scratch.clear()
        except FileNotFoundError as error:
            # Its last holder has just removed the folder.
            if Path(str(error.filename)).name != LOCK_NAME:
                raise
            raise in_use("a process that ended just now") from None


@contextmanager
def _swapping(folder: Path, scratch: Scratch) -> Iterator[Path]:
    new, old = scratch.folder / "new", scratch.folder / "old"
    if old.exists():
        if folder.exists():
            remove(old)
        else:
            old.rename(folder)
    remove(new)
    new.mkdir()
    yield new
    for path in (*new.iterdir(), new):
        sync(path)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
