"""Opening files without blocking, atomic writes of files, locks, and output folders."""

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from speculators_cli.core.errors import MachineError, SettingsError, SpeculatorsError

TEMPORARY = ".tmp-"  # prefix of incomplete files
LOCK_TRIALS, LOCK_POLL_SECONDS = 3, 0.05
BUFFER_BYTES = 2**20  # per read
NUM_PARTS, PART_BYTES = 8, 4096  # sampled parts of a file too large to be read completely
# Errors after which the next write fails as well. EFBIG is a file size limit of the system.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
# Errors of a kernel or a file system without a copy of its own.
CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotAFileError(OSError):
    """A path is a folder, a FIFO or the like where a file is expected."""


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read its bytes, unbuffered; links are followed.

    Opening a FIFO or a terminal would block, and reading a device might never end.

    Raises:
        OSError: It is not a regular file, or cannot be opened; `strerror` has the reason.
    """
    check_regular(file)
    # It may have been replaced since the check: opening must not block either.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_mode(os.fstat(descriptor).st_mode, file)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(file: Path) -> None:
    """Check that a path is a regular file, for libraries that open paths themselves.

    Raises:
        OSError: It is not; `strerror` has the reason.
    """
    _check_mode(file.stat().st_mode, file)


def _check_mode(mode: int, file: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise NotAFileError(number, f"{kind}, not a file", str(file))


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `file` atomically after the block.

    Raises:
        MachineError: The disk is full or fails.
    """
    with disk_errors(file.parent):
        temporary = _create_new(file.parent, file.name)
        try:
            yield temporary
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _create_new(folder: Path, name: str) -> Path:
    """Create an empty file with an unused name in a folder."""
    for number in count():
        path = folder / f"{TEMPORARY}{name}.{os.getpid()}{f'-{number}' if number else ''}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not run out")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert disk errors of the system to one with the folder and its free bytes.

    Args:
        folder: The folder being written to; may be missing.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise disk_error(folder, str(error.strerror)) from None


def disk_error(folder: Path, reason: str, *, num_bytes: int | None = None) -> MachineError:
    """Build the error for a disk that cannot be written to."""
    reason = reason.rpartition("I/O error: ")[2]  # prefix added by the safetensors library
    room = f"{format_bytes(shutil.disk_usage(find_existing(folder)).free)} free"
    if num_bytes is not None:
        room = f"{format_bytes(num_bytes)} needed, {room}"
    return MachineError(
        f"`{folder}` cannot be written: {reason} ({room})",
        hint="Free disk space, then rerun the same command",
    )


def format_bytes(num_bytes: int) -> str:
    """Format as `12.3 GiB`, in the largest unit with a value of at least 1."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def check_output_dir(folder: Path, *, flag: str) -> None:
    """Check that a folder can be written or created, without writing.

    Args:
        folder: May be missing, with any of its parents.
        flag: The flag it was passed with.

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
    """Return the path itself, or its nearest existing parent."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


class Lock:
    """A held lock, and the content that its last holder wrote."""

    def __init__(self, descriptor: int, folder: Path) -> None:
        self.descriptor = descriptor
        self.folder = folder
        self.last = _read_holder(descriptor)

    def write(self, **more: str) -> None:
        """Record the holder."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), **more}
        with disk_errors(self.folder):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(holder).encode(), 0)


@contextmanager
def locking(file: Path, *, in_use: Callable[[str], SpeculatorsError]) -> Iterator[Lock]:
    """Hold a lock that the system releases when the process ends for any reason.

    Args:
        file: Created if missing. Only the holder of the lock may remove it.
        in_use: Builds the error if another process holds it, from a description of that process.
    """
    with disk_errors(file.parent):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if not _try_to_lock(descriptor):
            raise in_use(describe_holder(_read_holder(descriptor)))
        if os.fstat(descriptor).st_nlink == 0:
            raise in_use("a process that ended just now")
        yield Lock(descriptor, file.parent)
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    """Lock a file, unless another process holds it for longer than `find_holder` does."""
    for _ in range(LOCK_TRIALS):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_POLL_SECONDS)
    return False


def find_holder(file: Path) -> dict[str, Any] | None:
    """Return what the process that holds a lock has written; None if nobody holds it."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(descriptor)
    finally:
        os.close(descriptor)
    return None


def describe_holder(holder: Mapping[str, Any]) -> str:
    """Return a description of the process that holds a lock."""
    return f"process {holder.get('pid')} on `{holder.get('host')}`"


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_parts(file: int) -> bytes:
    """Read evenly spaced parts of an open file, including its start and end."""
    last = max(os.fstat(file).st_size - PART_BYTES, 0)
    places = [last * part // (NUM_PARTS - 1) for part in range(NUM_PARTS)]
    return b"".join(os.pread(file, PART_BYTES, place) for place in places)


def write_at(file: int, data: bytes | memoryview, at: int) -> None:
    """Write all bytes at an offset of an open file, repeating partial writes.

    Args:
        file: File descriptor.
        data: Bytes; a memory view must be of single bytes.
        at: Offset.
    """
    view = memoryview(data)
    while len(view):
        num_written = os.pwrite(file, view, at)
        view, at = view[num_written:], at + num_written


def copy_range(source: int, start: int, target: int, at: int, num_bytes: int) -> None:
    """Copy bytes from one open file to another; in the kernel where supported.

    Args:
        source: Descriptor of the file to read.
        start: Offset in the source.
        target: Descriptor of the file to write.
        at: Offset in the target.
        num_bytes: Number of bytes.

    Raises:
        EOFError: The source ends before the range does.
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
    """Copy bytes in the kernel as far as supported; return their number."""
    num_copied = 0
    if not hasattr(os, "copy_file_range"):  # macOS
        return 0
    try:
        while num_copied < num_bytes:
            taken = os.copy_file_range(
                *(source, target, num_bytes - num_copied, start + num_copied, at + num_copied)
            )
            if taken == 0:  # the end, or a file system that reports it too early
                break
            num_copied += taken
    except OSError as error:
        if error.errno not in CANNOT_COPY:
            raise
    return num_copied


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def check_free_space(folder: Path, num_bytes: int, *, what: str, hint: str) -> None:
    """Check that a disk has enough free space for a write.

    Args:
        folder: A folder on the disk.
        num_bytes: Bytes needed; a small margin is added for other files.
        what: What needs the space, as the middle of a sentence.
        hint: How to fix too little space.

    Raises:
        MachineError: There is too little space.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + 2**20:
        raise MachineError(
            f"`{folder}` has {format_bytes(free)} free, {what} needs {format_bytes(num_bytes)}",
            hint=hint,
        )
