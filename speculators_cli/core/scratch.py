"""Folders of our own for what is not whole yet: a file in them proves whose they are.

A name proves nothing: what a killed process left is removed only from a folder that holds the mark,
which is written before anything else and removed after everything else.
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
    """A folder for what is not whole yet; made when it is needed, removed when it is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is anything of this name."""
        return os.path.lexists(self.folder)

    @property
    def is_own(self) -> bool:
        """Whether the folder holds our mark, or nothing at all."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return False
        names = [path.name for path in self.folder.iterdir()]
        mark = self.folder / MARK_NAME
        if MARK_NAME not in names or mark.is_symlink() or not mark.is_file():
            return not names
        content = mark.read_bytes()
        # A kill while the mark was written leaves a part of it, and nothing beside it.
        return content == MARK or (len(names) == 1 and MARK.startswith(content))

    def check(self, make_error: Callable[[Path], SpeculatorsError]) -> None:
        """Refuse a folder of this name that is not ours."""
        if self.exists and not self.is_own:
            raise make_error(self.folder)

    def open(self) -> Path:
        """The folder, made and marked; `check` has allowed it."""
        self.folder.mkdir(exist_ok=True)
        mark = self.folder / MARK_NAME
        if not mark.exists() or mark.read_bytes() != MARK:
            mark.write_bytes(MARK)
        return self.folder

    def clear(self) -> None:
        """Remove everything in the folder, then its mark, then the folder."""
        if not self.exists or not self.is_own:
            return
        for path in self.folder.iterdir():
            if path.name != MARK_NAME:
                remove(path)
        if {path.name for path in self.folder.iterdir()} <= {MARK_NAME}:
            (self.folder / MARK_NAME).unlink(missing_ok=True)
            with suppress(OSError):  # another process waits in it
                self.folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, *, flag: str) -> Iterator[Path]:
    """A folder to fill; it takes the place of `folder` once the block is done, never half.

    What a killed process left of an earlier try is removed; what it had moved away comes back.

    Args:
        folder: May be missing, with any of its parents. What is in it goes: the caller has made
            sure that it may.
        flag: The flag that named it.

    Raises:
        SettingsError: Another process is filling it, or the place for what is not whole is taken.
        MachineError: The disk is full.
    """
    folder = folder.absolute()
    scratch = Scratch(folder.with_name(f".speculators-{folder.name}"))
    scratch.check(
        lambda path: SettingsError(
            f"`{flag}`: `{path}` is needed while `{folder}` is written, and holds other files",
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
                scratch.open()  # again: the last holder may have removed the mark since
                lock.write()
                try:
                    with _swapping(folder, scratch) as new:
                        yield new
                finally:
                    scratch.clear()
        except FileNotFoundError as error:
            # Its last holder removed the folder in this very moment.
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
