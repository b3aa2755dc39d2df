"""What the other ranks do when something happens to one, and all when their launcher is gone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from tests.distributed.forked import TIMEOUT_SECONDS
from tests.fork_server import ForkServer
from tests.tiny_run import TinyInputs, write_inputs


@dataclass(frozen=True)
class Runs:
    """What the runs of `forked.py` left."""

    folder: Path
    codes: dict[str, list[int | None]]

    def err(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}.{rank}.err").read_text()

    def result(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name / "result.json").read_text())
        return content


@pytest.fixture(scope="module")
def runs(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    tiny: TinyInputs = write_inputs(tmp_path_factory.mktemp("ranks"))
    done = fork_server.run("tests.distributed.forked", tiny.folder)
    assert done.returncode == 0, done.stderr
    return Runs(tiny.folder, json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stopped", "Rank 1 died or hangs: no sign of life"),
        ("killed", "Rank 2 died or hangs: no sign of life"),
        ("host_killed", "Rank 0 died or hangs"),
        ("asleep", f"Rank 1 did not arrive within {TIMEOUT_SECONDS} s"),
        ("failed", "Rank 1 failed: ValueError: a bug of rank 1"),
        ("absent", f"Rank 1 did not join within {TIMEOUT_SECONDS} s"),
    ],
)
def test_a_rank_that_is_lost_is_named_by_the_others(runs: Runs, name: str, message: str) -> None:
    lost = int(message.split()[1])
    first, *others = (rank for rank in range(3) if rank != lost)

    assert f"error: {'[rank 1] ' if first else ''}{message}" in runs.err(name, first)
    code = 1 if name == "failed" else 5
    assert [runs.codes[name][rank] for rank in (first, *others)] == [code, code]
    assert "Unexpected RuntimeError" not in runs.err(name, first)
    if first == 0:
        assert message in runs.result(name)["error"]
        assert runs.result(name)["exit_code"] == code


def test_the_rank_that_is_behind_is_named_where_all_wait_in_vain(runs: Runs) -> None:
    message = f"Rank 1 did not arrive within {TIMEOUT_SECONDS} s"

    assert runs.codes["stuck"] == [5, 5]
    assert f"error: {message}" in runs.err("stuck", 0)
    assert f"error: [rank 1] {message}" in runs.err("stuck", 1)
    assert message in runs.result("stuck")["error"]


def test_the_rank_that_fails_has_its_own_error(runs: Runs) -> None:
    assert "error: [rank 1] Unexpected ValueError: a bug of rank 1" in runs.err("failed", 1)


def test_a_signal_to_one_rank_while_validating_stops_all_at_the_same_batch(runs: Runs) -> None:
    assert runs.codes["validating"] == [143, 143]
    (saved,) = find_checkpoints(runs.folder / "validating")
    assert saved.folder.name == f"step-{saved.state.step_in_epoch}"
    assert saved.state.step > 0
    assert runs.result("validating")["exit_code"] == 143


def test_tasks_of_slurm_are_ranks_without_torchrun(runs: Runs) -> None:
    assert runs.codes["slurm"] == [0, 0]
    state = json.loads((runs.folder / "slurm" / "0" / "trainer" / "state.json").read_text())
    assert state["num_ranks"] == 2
    outs = [(runs.folder / f"slurm.{rank}.out").read_text() for rank in (0, 1)]
    assert "Trained" in outs[0]
    assert outs[1] == ""


def test_ranks_whose_launcher_is_gone_save_and_end(runs: Runs) -> None:
    result = runs.result("orphans")

    assert result["exit_code"] == 143
    (saved,) = find_checkpoints(runs.folder / "orphans")[-1:]
    assert f"saved as `{saved.folder.name}`" in result["error"]
