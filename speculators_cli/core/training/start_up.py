"""StartUp: where the time goes before the first optimizer step has finished."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

STAT = Path("/proc/self/stat")


class StartUp:
    """Wall time of the parts of a start, in their order.

    Args:
        imports_seconds: From the start of the process to this call; None if unknown.
    """

    def __init__(self, imports_seconds: float | None = None) -> None:
        self.seconds = {} if imports_seconds is None else {"imports": imports_seconds}
        self._ended_at = time.perf_counter()

    def end(self, part: str) -> None:
        """Add the time since the end of the last part to this one."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._ended_at
        self._ended_at = now

    def describe(self) -> str:
        """Total and parts, in one line."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"Start-up took {sum(self.seconds.values()):.1f} s: {parts}"


def count_process_seconds() -> float | None:
    """Seconds since this process was started; None on systems other than Linux."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        ticks = int(STAT.read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    except OSError:
        return None
    started_at = ticks / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_at, 0.0)


def find_import_hint(module: ModuleType) -> str | None:
    """How to make imports faster, if Python compiles them at each start; None if it does not.

    Args:
        module: A large library that is imported.
    """
    cached = module.__spec__.cached if module.__spec__ is not None else None
    if cached is None or Path(cached).exists():
        return None
    fix = (
        "Unset `PYTHONDONTWRITEBYTECODE`"
        if sys.dont_write_bytecode
        else "Set `PYTHONPYCACHEPREFIX` to a folder that persists"
    )
    return f"{fix} to start faster: Python compiles `{module.__name__}` again at each start"
