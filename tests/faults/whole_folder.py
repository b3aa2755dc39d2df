"""Jobs that write a folder of whole files: killed at each change on disk, then run again."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.kill_points import SHARES, Point, fork, wait
from tests.run_files import tree


def list_points(
    changes: Sequence[str], expected: Mapping[str, bytes], begun: re.Pattern[str]
) -> list[Point]:
    """Every change, and some lengths of each file that is begun.

    Args:
        changes: Of an uninterrupted run.
        expected: Files that it ends with, by their names.
        begun: Matches a change that opens a file for writing; the first group is its name.
    """
    sizes = {Path(name).name: len(data) for name, data in expected.items()}
    last: dict[str, int] = {}  # the last time each is opened for writing
    for number, change in enumerate(changes, 1):
        found = begun.fullmatch(change)
        if found is not None:
            last[found[1]] = number
    return [Point(number) for number in range(1, len(changes) + 1)] + [
        Point(number, num_bytes=int(share * sizes[name]))
        for name, number in last.items()
        for share in SHARES
    ]


def try_points(
    work: Callable[[], object],
    out_dir: Path,
    *,
    begun: re.Pattern[str],
    is_unfinished: Callable[[str], bool],
    find_damage: Callable[[], str | None] = lambda: None,
    every: int,
) -> dict[str, Any]:
    """Run a job, then again and again with a kill, each time followed by another run.

    Args:
        work: The job.
        out_dir: Folder that it writes.
        begun: As in `list_points`.
        is_unfinished: Whether a file may be there after a kill without being a part of the result.
        find_damage: What else may be wrong after a run.
        every: Try each so many-th point.

    Returns:
        Counts, and what was found wrong.
    """
    log = out_dir.with_name("log")

    def run(point: Point | None = None) -> int:
        return wait(fork(work, out_dir, point=point, log=None if point else log))

    assert run() == 0
    expected = tree(out_dir)
    points = list_points(json.loads(log.read_text()), expected, begun)
    tried, failures = points[::every], []
    for point in tried:
        shutil.rmtree(out_dir)
        if run(point) not in (-signal.SIGKILL, -signal.SIGXFSZ):
            failures.append(f"{point} was not reached")
        left = tree(out_dir) if out_dir.exists() else {}
        whole = {name: data for name, data in left.items() if not is_unfinished(name)}
        if not whole.items() <= expected.items():
            failures.append(f"a file is torn after {point}")
        if run() != 0 or tree(out_dir) != expected:
            failures.append(f"the next run differs after {point}")
        if (damage := find_damage()) is not None:
            failures.append(f"{damage} after {point}")
    return {
        "num_points": len(points),
        "num_files": len(expected),
        "tried": len(tried),
        "tried_in_writes": sum(point.num_bytes is not None for point in tried),
        "failures": failures,
    }
