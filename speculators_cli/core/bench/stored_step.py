"""A step with hidden states from a disk, estimated from one that computes them."""

from dataclasses import dataclass
from math import ceil
from typing import Self

from speculators_cli.core.data.disk_speed import DiskSpeed


@dataclass(frozen=True)
class StoredStep:
    """A step whose hidden states were stored by an earlier capture."""

    is_float8: bool
    num_bytes: int  # read
    step_ms: float
    num_epochs: int | None  # from which on storing takes less time than computing; None: never

    @classmethod
    def of(
        cls,
        num_bytes: int,
        disk: DiskSpeed,
        *,
        step_ms: float,
        capture_ms: float,
        is_float8: bool,
    ) -> Self:
        """Estimate from a step with capture, and from the speed of a disk."""
        read_ms = num_bytes / disk.read_bytes_per_second * 1e3
        write_ms = num_bytes / disk.written_bytes_per_second * 1e3
        stored_ms = max(step_ms - capture_ms, read_ms)
        saved_ms = step_ms - stored_ms
        num_epochs = ceil(max(capture_ms, write_ms) / saved_ms) if saved_ms > 0 else None
        return cls(is_float8, num_bytes, stored_ms, num_epochs)
