"""kill -9 at any change on disk: what was saved is whole, and a resumed run ends the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyInputs


def try_kill_points(folder: Path, every: int, *, script: str = "kill_points") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{script}", str(folder), str(every)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny: TinyInputs) -> None:
    report = try_kill_points(tiny.folder, every=4)

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 20


@pytest.mark.slow
def test_every_kill_point_is_survived(tiny: TinyInputs) -> None:
    report = try_kill_points(tiny.folder, every=1)

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 200


def write_v0(folder: Path, num_samples: int) -> Path:
    folder.mkdir()
    for index in range(num_samples):
        sample = {
            "input_ids": torch.arange(7),
            "loss_mask": torch.ones(7),
            "hidden_state": torch.randn(7, 6),
            "target": torch.randn(7, 2),
        }
        torch.save(sample, folder / f"data_{index}.pt")
    return folder


def test_a_killed_conversion_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    v0_dir = write_v0(tmp_path / "v0", num_samples=8)

    report = try_kill_points(v0_dir, every=1, script="convert_kill_points")

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 20


@pytest.mark.slow
def test_every_kill_point_of_a_conversion_is_survived(tmp_path: Path) -> None:
    v0_dir = write_v0(tmp_path / "v0", num_samples=60)

    report = try_kill_points(v0_dir, every=1, script="convert_kill_points")

    assert report["failures"] == []
    assert int(str(report["tried"])) >= 100
