"""What launchers and schedulers leave in the environment."""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.place import Place, adopt_slurm, first_host, read_place
from speculators_cli.core.training import distributed
from speculators_cli.core.training.run import train
from tests.tiny_run import TinyInputs

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}


def test_torchruns_variables_give_the_place() -> None:
    assert read_place(TORCHRUN) == Place(5, 8, 1, 4, "gpu1", 29500)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "", "MASTER_ADDR": "gpu1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_what_is_left_of_a_run_of_one_process_is_harmless(environment: dict[str, str]) -> None:
    assert read_place(environment) == Place()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "`WORLD_SIZE` is `8`, `MASTER_ADDR` is not set"),
        ({"MASTER_PORT": ""}, "`WORLD_SIZE` is `8`, `MASTER_PORT` is not set"),
        ({"MASTER_PORT": "70000"}, "`MASTER_PORT` is `70000`"),
        ({"WORLD_SIZE": ""}, "`RANK` is `5`, `WORLD_SIZE` is not set"),
        ({"WORLD_SIZE": "1"}, "`RANK` is `5`, `WORLD_SIZE` is `1`"),
        ({"WORLD_SIZE": "5"}, "`RANK` is `5`, `WORLD_SIZE` is `5`"),
        ({"RANK": ""}, "`WORLD_SIZE` is `8`, `RANK` is not set"),
        ({"RANK": "-1"}, "`RANK` is `-1`, not a number"),
        ({"WORLD_SIZE": "eight"}, "`WORLD_SIZE` is `eight`, not a number"),
        ({"LOCAL_RANK": "1.5"}, "`LOCAL_RANK` is `1.5`, not a number"),
        ({"LOCAL_WORLD_SIZE": "%"}, "`LOCAL_WORLD_SIZE` is `%`, not a number"),
    ],
    ids=str,
)
def test_half_a_distributed_environment_is_refused_by_name_and_value(
    change: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        read_place(TORCHRUN | change)

    assert message in refused.value.message
    assert refused.value.exit_code == 2
    assert refused.value.hint is not None


def test_each_task_of_a_slurm_step_is_a_rank() -> None:
    environment = dict(SRUN)

    adopt_slurm(environment)

    assert read_place(environment) == Place(4, 6, 1, 3, "gpu03", 20000 + 77 * 31 + 2)


def test_tasks_on_one_node_meet_there() -> None:
    environment = SRUN | {"SLURM_STEP_NODELIST": "gpu7"}

    adopt_slurm(environment)

    assert (read_place(environment).address, read_place(environment).num_local_ranks) == (
        "127.0.0.1",
        6,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NODELIST": ""},  # a batch script
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},  # one task of a larger allocation
        {"SLURM_PROCID": ""},
    ],
    ids=str,
)
def test_slurm_without_a_step_of_several_tasks_is_left_alone(change: dict[str, str]) -> None:
    environment = SRUN | change

    adopt_slurm(environment)

    assert read_place(environment) == Place()


@pytest.mark.parametrize(("num_gpus", "device"), [(1, "cuda:0"), (3, "cuda:1")])
def test_a_task_of_slurm_may_see_its_own_gpu_alone(
    num_gpus: int, device: str, tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = SimpleNamespace(watching=nullcontext, store=None)
    chosen: list[torch.device] = []

    def stop_at(**fields: Any) -> None:
        chosen.append(fields["device"])
        raise MachineError("far enough")

    monkeypatch.setattr(os, "environ", {**os.environ, **SRUN, "RANK": ""})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(distributed, "RankWatch", lambda *_, **__: watch)
    monkeypatch.setattr(distributed, "Ranks", stop_at)

    with pytest.raises(MachineError, match="far enough"):
        train(tiny.settings(distributed={"device": "cuda"}))

    assert chosen == [torch.device(device)]


def test_what_is_set_wins_over_slurm() -> None:
    within_torchrun = SRUN | TORCHRUN
    with_address = SRUN | {"MASTER_ADDR": "gpu9", "MASTER_PORT": "4000"}

    adopt_slurm(within_torchrun)
    adopt_slurm(with_address)

    assert read_place(within_torchrun) == read_place(TORCHRUN)
    assert read_place(with_address) == Place(4, 6, 1, 3, "gpu9", 4000)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-012,020],cpu1", "gpu007"),
        ("rack[1-2]-gpu[3,5]", "rack1-gpu3"),
        ("a-b.example", "a-b.example"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
