"""Files that are opened without waiting, or appear whole or not at all; locks; output folders."""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from speculators_cli.core.errors import MachineError, SettingsError, SpeculatorsError

TEMPORARY = ".tmp-"  # begins the name of a file that is not whole yet
BUFFER_BYTES = 2**20  # read at once
NUM_PARTS, PART_BYTES = 8, 4096  # of a file too large to be read whole
# The next write fails as well. EFBIG is a limit on files that the system was given.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
# What a kernel or a file system says that does not copy by itself.
CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFileError(OSError):
    """A path leads to a folder, a FIFO or the like where a file is expected."""


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read its bytes, unbuffered; links are followed.

    A FIFO or a terminal in its place would make any reader wait, a device might never end.

    Raises:
        OSError: It is not a regular file, or cannot be opened; `strerror` has the reason.
    """
    check_regular(file)
    # It may have been replaced since: opening must not wait either.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_mode(os.fstat(descriptor).st_mode, file)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(file: Path) -> None:
    """Check that a path leads to a regular file, for libraries that open it by themselves.

    Raises:
        OSError: It does not; `strerror` has the reason.
    """
    _check_mode(file.stat().st_mode, file)


def _check_mode(mode: int, file: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise NotAFileError(number, f"{kind}, not a file", str(file))


@contextmanager
def replacing(file: Path, *, within: Path | None = None) -> Iterator[Path]:
    """A path to write to; it takes the place of `file` once the block is done, never half.

    Args:
        file: May exist.
        within: Folder on the same disk for what is not whole yet; None: beside the file.

    Raises:
        MachineError: The disk is full or fails.
    """
    with disk_errors(file.parent):
        temporary = _create_new(within or file.parent, file.name)
        try:
            yield temporary
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _create_new(folder: Path, name: str) -> Path:
    """An empty file in a folder, under a name that nothing had."""
    for number in count():
        path = folder / f"{TEMPORARY}{name}.{os.getpid()}{f'-{number}' if number else ''}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is always another number")


@contextmanager
def disk_errors(folder: Path, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the system's errors of a disk into one that names the folder and its free bytes.

    Args:
        folder: What is written to; may be missing.
        num_bytes: How many were about to be written, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise disk_error(folder, str(error.strerror), num_bytes=num_bytes) from None


def disk_error(folder: Path, reason: str, *, num_bytes: int | None = None) -> MachineError:
    """The error for a disk that takes no more."""
    reason = reason.rpartition("I/O error: ")[2]  # of the safetensors library
    room = f"{format_bytes(shutil.disk_usage(find_existing(folder)).free)} free"
    if num_bytes is not None:
        room = f"{format_bytes(num_bytes)} needed, {room}"
    return MachineError(
        f"`{folder}` cannot be written: {reason} ({room})",
        hint="Make room on the disk, then run the same command again",
    )


def format_bytes(num_bytes: int) -> str:
    """Such as `12.3 GiB`, in the largest unit that leaves a digit before the point."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def check_output_dir(folder: Path, *, flag: str) -> None:
    """Check that a folder can be written or made, without writing.

    Args:
        folder: May be missing, with any of its parents.
        flag: The flag that named it.

    Raises:
        SettingsError: It cannot.
    """
    existing = find_existing(folder)
    if not existing.is_dir():
        raise SettingsError(
            f"`{flag}`: `{existing}` is not a folder", hint="Pass a folder, new or existing"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(
            f"`{flag}`: `{existing}` cannot be written", hint="Pass a folder that you may write to"
        )


def find_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


class Lock:
    """A lock that is held, and what its last holder wrote into it."""

    def __init__(self, descriptor: int, folder: Path) -> None:
        self.descriptor = descriptor
        self.folder = folder
        self.last = _read_holder(descriptor)

    def write(self, **more: str) -> None:
        """Say who holds it."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), **more}
        with disk_errors(self.folder):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(holder).encode(), 0)


@contextmanager
def locking(file: Path, *, in_use: Callable[[str], SpeculatorsError]) -> Iterator[Lock]:
    """Hold a lock that the system frees when the process ends, however it ends.

    Args:
        file: Made if missing. Only who holds the lock may remove it.
        in_use: The error to raise where another process holds it, from the name of that.
    """
    with disk_errors(file.parent):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            raise in_use(f"process {holder.get('pid')} on `{holder.get('host')}`") from None
        if os.fstat(descriptor).st_nlink == 0:
            raise in_use("a process that ended just now")
        yield Lock(descriptor, file.parent)
    finally:
        os.close(descriptor)


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_parts(file: int) -> bytes:
    """Some evenly spaced parts of an open file, its start and end among them."""
    last = max(os.fstat(file).st_size - PART_BYTES, 0)
    places = [last * part // (NUM_PARTS - 1) for part in range(NUM_PARTS)]
    return b"".join(os.pread(file, PART_BYTES, place) for place in places)


def write_at(file: int, data: bytes | memoryview, at: int) -> None:
    """Write all of some bytes at a place of an open file; the system may take them piece by piece.

    Args:
        file: Descriptor.
        data: Bytes; a memory view must be of single bytes.
        at: Where they begin.
    """
    view = memoryview(data)
    while len(view):
        num_written = os.pwrite(file, view, at)
        view, at = view[num_written:], at + num_written


def copy_range(source: int, start: int, target: int, at: int, num_bytes: int) -> None:
    """Copy bytes from one open file into another; in the kernel where it can.

    Args:
        source: Descriptor of the file to read.
        start: Where the bytes begin in it.
        target: Descriptor of the file to write.
        at: Where they begin in it.
        num_bytes: How many.

    Raises:
        EOFError: The source ends before them.
    """
    num_copied = _copy_in_kernel(source, start, target, at, num_bytes)
    while num_copied < num_bytes:
        wanted = min(BUFFER_BYTES, num_bytes - num_copied)
        data = os.pread(source, wanted, start + num_copied)
        if not data:
            raise EOFError("the file ends early")
        write_at(target, data, at + num_copied)
        num_copied += len(data)


def _copy_in_kernel(source: int, start: int, target: int, at: int, num_bytes: int) -> int:
    """Copy as many of the bytes as the kernel does; returns how many."""
    num_copied = 0
    if not hasattr(os, "copy_file_range"):  # macOS
        return 0
    try:
        while num_copied < num_bytes:
            taken = os.copy_file_range(
                *(source, target, num_bytes - num_copied, start + num_copied, at + num_copied)
            )
            if taken == 0:  # the end, or a file system that only says so
                break
            num_copied += taken
    except OSError as error:
        if error.errno not in CANNOT_COPY:
            raise
    return num_copied


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
            f"`{folder}` has {format_bytes(free)} free, {what} takes {format_bytes(num_bytes)}",
            hint=hint,
        )
