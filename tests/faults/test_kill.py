"""kill -9 at any change on disk: what was saved is whole, and a resumed run ends the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fork_server import ForkServer
from tests.tiny_run import TinyInputs

Report = dict[str, Any]


def try_kill_points(fork_server: ForkServer, program: str, *arguments: object) -> Report:
    done = fork_server.run(f"tests.faults.{program}", *arguments)
    assert done.returncode == 0, done.stderr
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


# Every so many-th point of each job: together with those of `convert-v0` at least sixty.
FEW = {"train": (10, 14), "behind": (8, 14), "over": (11, 13), "export": (3, 6), "ranks": (60, 3)}
ALL = {"train": 100, "behind": 100, "over": 100, "export": 15, "ranks": 100}
# The least part of the points at which training is ahead of the checkpoint being written.
AHEAD = {"train": 0.3, "behind": 0.3, "over": 0.3, "export": 0.0, "ranks": 0.1}


@pytest.mark.parametrize("job", FEW)
def test_a_killed_job_ends_as_if_nothing_had_happened(
    fork_server: ForkServer, tiny: TinyInputs, job: str
) -> None:
    every, fewest = FEW[job]

    report = try_kill_points(fork_server, "kill_points", tiny.folder, job, every)

    assert report["failures"] == []
    assert report["tried"] >= fewest
    assert report["ahead"] >= AHEAD[job] * report["tried"]


@pytest.mark.slow
@pytest.mark.parametrize("job", ALL)
def test_every_kill_point_is_survived(fork_server: ForkServer, tiny: TinyInputs, job: str) -> None:
    report = try_kill_points(fork_server, "kill_points", tiny.folder, job, 1)

    assert report["failures"] == []
    assert report["tried"] == report["num_points"] >= ALL[job]
    assert report["tried_in_writes"] == report["points_in_writes"] >= 3
    assert report["ahead"] >= AHEAD[job] * report["tried"]


def write_v0(folder: Path, num_samples: int) -> Path:
    folder.mkdir()
    for index in range(num_samples):
        sample = {
            "input_ids": torch.arange(7),
            "loss_mask": torch.ones(7),
            "hidden_state": torch.randn(7, 768),
            "target": torch.randn(7, 256),
        }
        torch.save(sample, folder / f"data_{index}.pt")
    return folder


def test_a_killed_conversion_leaves_whole_files_and_goes_on(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    v0_dir = write_v0(tmp_path / "v0", num_samples=8)

    report = try_kill_points(fork_server, "convert_kill_points", v0_dir, 2)

    assert report["failures"] == []
    assert report["tried"] >= 20
    assert report["tried_in_writes"] >= 10


@pytest.mark.slow
def test_every_kill_point_of_a_conversion_is_survived(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    v0_dir = write_v0(tmp_path / "v0", num_samples=25)

    report = try_kill_points(fork_server, "convert_kill_points", v0_dir, 1)

    assert report["failures"] == []
    assert report["tried"] >= 100
    assert report["tried_in_writes"] >= 70


# Of two jobs every third point: more than sixty.
@pytest.mark.parametrize("job", ["answers", "float8"])
def test_a_killed_generation_leaves_whole_files_and_goes_on(
    fork_server: ForkServer, tmp_path: Path, job: str
) -> None:
    report = try_kill_points(fork_server, "generate_kill_points", tmp_path, job, 3)

    assert report["failures"] == []
    assert report["tried"] >= 32
    assert report["tried_in_writes"] >= 12


@pytest.mark.slow
@pytest.mark.parametrize("job", ["answers", "float8"])
def test_every_kill_point_of_a_generation_is_survived(
    fork_server: ForkServer, tmp_path: Path, job: str
) -> None:
    report = try_kill_points(fork_server, "generate_kill_points", tmp_path, job, 1)

    assert report["failures"] == []
    assert report["tried"] == report["num_points"] >= 100
    assert report["tried_in_writes"] >= 36
