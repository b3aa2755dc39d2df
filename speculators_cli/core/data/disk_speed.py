"""How fast the disk of a folder is read and written, measured on a scratch file."""

import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from speculators_cli.core.files import TEMPORARY, find_existing

BLOCK_BYTES = 8 * 2**20
MAX_BYTES = 256 * 2**20  # of the scratch file
MAX_SHARE = 0.01  # of the free space
WRITE_SECONDS, READ_SECONDS = 1.0, 1.0  # after which no block is begun
NUM_READERS = 4  # as training reads, in several threads


@dataclass(frozen=True)
class DiskSpeed:
    """Rates of large blocks."""

    read_bytes_per_second: float
    written_bytes_per_second: float
    bypasses_cache: bool  # whether reads came from the disk, not from the page cache
    free_bytes: int


def measure_disk(folder: Path) -> DiskSpeed | None:
    """Write and read a scratch file in a folder, or in its nearest parent that exists.

    Takes a few seconds at most; the file is gone as soon as it is open.

    Returns:
        None if the folder cannot be written, or its disk is nearly full.
    """
    folder = find_existing(folder)
    usage = os.statvfs(folder)
    free = usage.f_bavail * usage.f_frsize
    num_blocks = int(min(MAX_BYTES, MAX_SHARE * free)) // BLOCK_BYTES
    if num_blocks == 0:
        return None
    try:
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    except OSError:
        return None
    try:
        reader, bypasses_cache = _open_to_read(name)
    finally:
        Path(name).unlink()
    try:
        written, num_written = _write(descriptor, num_blocks)
        read = _read(reader, num_written)
    except OSError:
        return None
    finally:
        os.close(descriptor)
        os.close(reader)
    return DiskSpeed(read, written, bypasses_cache, free)


def _open_to_read(name: str) -> tuple[int, bool]:
    with suppress(OSError):  # file systems in memory have no direct reads
        return os.open(name, os.O_RDONLY | os.O_DIRECT), True
    return os.open(name, os.O_RDONLY), False


def _write(descriptor: int, num_blocks: int) -> tuple[float, int]:
    """Write blocks up to the disk itself; return bytes per second, and the number of blocks."""
    block = os.urandom(BLOCK_BYTES)  # some disks compress
    began_at, count = time.perf_counter(), 0
    while count < num_blocks and (not count or time.perf_counter() - began_at < WRITE_SECONDS):
        os.pwrite(descriptor, block, count * BLOCK_BYTES)
        os.fdatasync(descriptor)
        count += 1
    rate = count * BLOCK_BYTES / (time.perf_counter() - began_at)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return rate, count


def _read(descriptor: int, num_blocks: int) -> float:
    """Read blocks in several threads; return bytes per second."""
    began_at = time.perf_counter()

    def read(block: int) -> int:
        if block >= NUM_READERS and time.perf_counter() - began_at > READ_SECONDS:
            return 0
        with mmap.mmap(-1, BLOCK_BYTES) as memory:  # aligned, as direct reads need
            return os.preadv(descriptor, [memory], block * BLOCK_BYTES)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        num_bytes = sum(pool.map(read, range(num_blocks)))
    return num_bytes / (time.perf_counter() - began_at)
