"""Converts a folder once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.convert_kill_points V0_FOLDER EVERY

After each kill every v1 file is whole or absent and the source is as it was; the run that follows
ends in the very tree of the uninterrupted one.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from speculators_cli.core.preparation.conversion import convert_v0
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.convert_v0 import ConvertV0Settings
from tests.faults.kill_points import watch


def convert(v0_dir: Path, out_dir: Path, *, kill_at: int | None, count: Path) -> int:
    """Convert in a fork; returns its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:

        def act(number: int, _path: str) -> None:
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count.write_text(str(number))

        watch(out_dir, act)
        files = {"v0_path": v0_dir, "output_dir": out_dir, "workers": 1}
        code = 1
        try:
            convert_v0(
                ConvertV0Settings.model_validate({"files": files}), progress=SilentProgress()
            )
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def main() -> None:
    """Try kill points and print what was found as JSON."""
    v0_dir, every = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    out_dir, count = v0_dir.with_name("v1"), v0_dir.with_name("count")
    source = tree(v0_dir)
    assert convert(v0_dir, out_dir, kill_at=None, count=count) == 0
    expected, num_points = tree(out_dir), int(count.read_text())
    failures: list[str] = []
    tried = 0
    for point in range(1, num_points + 1, every):
        shutil.rmtree(out_dir)
        tried += 1
        if convert(v0_dir, out_dir, kill_at=point, count=count) != -signal.SIGKILL:
            failures.append(f"point {point} was not reached")
        left = tree(out_dir) if out_dir.exists() else {}
        whole = {name: data for name, data in left.items() if ".tmp-" not in name}
        if not whole.items() <= expected.items():
            failures.append(f"a file is torn after point {point}")
        if convert(v0_dir, out_dir, kill_at=None, count=count) != 0 or tree(out_dir) != expected:
            failures.append(f"the next run differs after point {point}")
        if tree(v0_dir) != source:
            failures.append(f"the source differs after point {point}")
    print(json.dumps({"num_points": num_points, "tried": tried, "failures": failures}))  # noqa: T201


if __name__ == "__main__":
    main()
