"""Converts a folder once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.convert_kill_points V0_FOLDER EVERY

Kill points are those of `kill_points`: changes on disk, and writes of samples at some of their
lengths. After each kill every v1 file is whole or absent and the source is as it was; the run that
follows ends in the very tree of the uninterrupted one.
"""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from speculators_cli.core.preparation.conversion import convert_v0
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.convert_v0 import ConvertV0Settings
from tests.faults.kill_points import SHARES, Point, fork, wait
from tests.run_files import tree

TEMPORARY = re.compile(r"open .*/\.tmp-(.+\.pt)\.\d+")


def list_points(changes: Sequence[str], expected: Mapping[str, bytes]) -> list[Point]:
    """Every change, and some lengths of each file that is begun."""
    sizes = {Path(name).name: len(data) for name, data in expected.items()}
    points = [Point(number) for number in range(1, len(changes) + 1)]
    begun: dict[str, int] = {}  # the last time each is opened for writing
    for number, change in enumerate(changes, 1):
        found = TEMPORARY.fullmatch(change)
        if found is not None:
            begun[found[1]] = number
    return points + [
        Point(number, num_bytes=int(share * sizes[name]))
        for name, number in begun.items()
        for share in SHARES
    ]


def main() -> None:
    """Try kill points and print what was found as JSON."""
    v0_dir, every = Path(sys.argv[1]), int(sys.argv[2])
    out_dir, log = v0_dir.with_name("v1"), v0_dir.with_name("log")
    source = tree(v0_dir)
    files = {"v0_path": v0_dir, "output_dir": out_dir, "workers": 1}
    settings = ConvertV0Settings.model_validate({"files": files})

    def convert(point: Point | None = None) -> int:
        work: Callable[[], object] = lambda: convert_v0(settings, progress=SilentProgress())  # noqa: E731
        return wait(fork(work, out_dir, point=point, log=None if point else log))

    assert convert() == 0
    expected = tree(out_dir)
    points = list_points(json.loads(log.read_text()), expected)
    tried, failures = points[::every], []
    for point in tried:
        shutil.rmtree(out_dir)
        if convert(point) not in (-signal.SIGKILL, -signal.SIGXFSZ):
            failures.append(f"{point} was not reached")
        left = tree(out_dir) if out_dir.exists() else {}
        whole = {name: data for name, data in left.items() if ".tmp-" not in name}
        if not whole.items() <= expected.items():
            failures.append(f"a file is torn after {point}")
        if convert() != 0 or tree(out_dir) != expected:
            failures.append(f"the next run differs after {point}")
        if tree(v0_dir) != source:
            failures.append(f"the source differs after {point}")
    report = {
        "num_points": len(points),
        "tried": len(tried),
        "tried_in_writes": sum(point.num_bytes is not None for point in tried),
        "failures": failures,
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
