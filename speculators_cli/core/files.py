"""Files that appear whole or not at all, and folders that can be written."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators_cli.core.errors import MachineError, SettingsError

TEMPORARY = ".tmp-"  # begins the name of a file that is not whole yet


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `file` once the block is done, never half."""
    temporary = file.with_name(f"{TEMPORARY}{file.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_dir(folder: Path, *, flag: str) -> None:
    """Check that a folder can be written or made, without writing.

    Args:
        folder: May be missing, with any of its parents.
        flag: The flag that named it.

    Raises:
        SettingsError: It cannot.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise SettingsError(
            f"`{flag}`: `{existing}` is not a folder", hint="Name a folder, new or old"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(
            f"`{flag}`: `{existing}` cannot be written", hint="Name a folder you may write to"
        )


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `folder` once the block is done, never half.

    What a killed process left of an earlier try is removed; what it had moved away comes back.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f"{TEMPORARY}{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in folder.parent.glob(f"{TEMPORARY}{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists():
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write an object as JSON that people can read."""
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def check_free_space(folder: Path, num_bytes: int, *, what: str, hint: str) -> None:
    """Check that a disk has room for what is about to be written.

    Args:
        folder: On the disk.
        num_bytes: Needed; a little more is asked for, for what lies beside it.
        what: Takes that room, as the middle of a sentence.
        hint: What to do where there is too little.

    Raises:
        MachineError: There is too little.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + 2**20:
        raise MachineError(
            f"`{folder}` has {free / 2**30:.2f} GiB free, {what} takes {num_bytes / 2**30:.2f} GiB",
            hint=hint,
        )
