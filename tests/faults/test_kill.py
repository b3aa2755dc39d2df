"""kill -9 at any change on disk: what was saved is whole, and a resumed run ends the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import TinyInputs


def try_kill_points(tiny: TinyInputs, every: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_points", str(tiny.folder), str(every)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny: TinyInputs) -> None:
    report = try_kill_points(tiny, every=4)

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 20


@pytest.mark.slow
def test_every_kill_point_is_survived(tiny: TinyInputs) -> None:
    report = try_kill_points(tiny, every=1)

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 200
