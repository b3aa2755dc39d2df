"""Runs of several ranks on gloo in which something happens to one; a few of them at once.

A program of its own: it imports the package once and forks every rank of every run, which a process
that has computed already cannot do.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

import speculators_cli.core.training.run  # noqa: F401 - before the forks
from speculators_cli.cli.app import run as run_command
from speculators_cli.core.training.trainer import Trainer
from tests.ranks import Environment, choose_port, torchrun
from tests.tiny_run import TinyInputs

TIMEOUT_SECONDS = 4
LOADED = transformers.LlamaForCausalLM  # before the forks, too


def at_step(step: int, act: Callable[[], object]) -> None:
    """Let this process act before an optimizer step, counted from 0."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, *args: Any) -> None:
        if trainer.state.step == step:
            act()
        real(trainer, *args)

    Trainer.train_step = train_step  # type: ignore[method-assign, assignment]


def in_validation(act: Callable[[], object]) -> None:
    """Let this process act before each validation."""
    real = Trainer.validate

    def validate(trainer: Trainer) -> Any:
        act()
        return real(trainer)

    Trainer.validate = validate  # type: ignore[method-assign, assignment]


def wait_as_on_a_gpu(num_passed: int) -> None:
    """Let this process hang in step 2, `num_passed` collectives on, where no error is raised."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, *args: Any) -> None:
        watch = trainer.ranks.watch
        assert watch is not None
        if trainer.state.step == 2:
            for _ in range(num_passed):
                watch.passed()
            with watch.ending_when_stuck():
                time.sleep(60)
        real(trainer, *args)

    Trainer.train_step = train_step  # type: ignore[method-assign, assignment]


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("a bug of rank 1")


def srun(rank: int, num_ranks: int, port: int) -> Environment:
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(num_ranks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": socket.gethostname(),
    }


@dataclass
class Scenario:
    num_ranks: int
    prepare: Mapping[int, Callable[[], object]]  # what a rank does before it starts
    epochs: int = 50
    environment: Callable[[int, int, int], Environment] = torchrun
    launcher_ends: bool = False
    timeout_seconds: int = TIMEOUT_SECONDS


NEVER_END = ("stopped", "asleep")  # rank 1 of these
SCENARIOS = {
    "stopped": Scenario(3, {1: lambda: at_step(2, send(signal.SIGSTOP))}),
    "asleep": Scenario(3, {1: lambda: at_step(2, lambda: time.sleep(60))}),
    "stuck": Scenario(2, {0: lambda: wait_as_on_a_gpu(1), 1: lambda: wait_as_on_a_gpu(0)}),
    "killed": Scenario(3, {2: lambda: at_step(2, send(signal.SIGKILL))}),
    "host_killed": Scenario(3, {0: lambda: at_step(2, send(signal.SIGKILL))}),
    "failed": Scenario(3, {1: lambda: at_step(2, fail)}),
    "absent": Scenario(3, {1: lambda: os._exit(0)}),
    # No rank is lost: a busy machine has all the time that it needs.
    "validating": Scenario(2, {1: lambda: in_validation(send(signal.SIGTERM))}, timeout_seconds=60),
    "slurm": Scenario(2, {}, epochs=1, environment=srun, timeout_seconds=60),
    "orphans": Scenario(2, {}, launcher_ends=True, timeout_seconds=60),
}


def start_rank(name: str, rank: int, port: int, tiny: TinyInputs) -> int:
    """Fork a rank; its output goes into a file."""
    scenario = SCENARIOS[name]
    pid = os.fork()
    if pid:
        return pid
    for suffix, descriptor in (("out", 1), ("err", 2)):
        log = os.open(tiny.folder / f"{name}.{rank}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, descriptor)
    os.environ.update(scenario.environment(rank, scenario.num_ranks, port))
    scenario.prepare.get(rank, lambda: None)()
    flags = tiny.flags(
        save_path=tiny.folder / name,
        timeout_seconds=scenario.timeout_seconds,
        epochs=scenario.epochs,
        sharding="shard",
    )
    code = run_command(["train", *flags])
    sys.stdout.flush()
    os._exit(code)


def start_launcher(name: str, port: int, tiny: TinyInputs) -> int:
    """Fork a launcher that ends when its ranks have made a step."""
    pid = os.fork()
    if pid:
        return pid
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    for rank in range(SCENARIOS[name].num_ranks):
        start_rank(name, rank, port, tiny)
    metrics_file = tiny.folder / name / "metrics.jsonl"
    while not (metrics_file.exists() and metrics_file.stat().st_size):
        time.sleep(0.1)
    os._exit(0)


def wait(pids: list[int], seconds: float) -> list[int | None]:
    """Exit codes; None for those that do not end, which are killed."""
    until = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(pids) and time.monotonic() < until:
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.05)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def run_together(names: Sequence[str], tiny: TinyInputs) -> dict[str, list[int | None]]:
    """Exit codes of the ranks of some runs; of the launcher, where there is one."""
    pids: dict[str, list[int]] = {}
    for name in names:
        scenario, port = SCENARIOS[name], choose_port()
        if scenario.launcher_ends:
            pids[name] = [start_launcher(name, port, tiny)]
        else:
            pids[name] = [start_rank(name, k, port, tiny) for k in range(scenario.num_ranks)]
    lost = [pids[name][1] for name in names if name in NEVER_END]
    waited = [pid for ranks in pids.values() for pid in ranks if pid not in lost]
    codes = dict(zip(waited, wait(waited, 40.0), strict=True))
    codes |= dict(zip(lost, wait(lost, 0.0), strict=True))
    return {name: [codes[pid] for pid in ranks] for name, ranks in pids.items()}


def main(folder: str) -> None:
    """Run all and print the exit codes of each rank."""
    tiny = TinyInputs(Path(folder))
    codes: dict[str, list[int | None]] = {}
    for names in batched(SCENARIOS, 3):
        codes |= run_together(names, tiny)
    until = time.monotonic() + 30
    while not (tiny.folder / "orphans" / "result.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    print(json.dumps(codes))  # noqa: T201


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    left = list(names)
    for start in range(0, len(left), size):
        yield left[start : start + size]


if __name__ == "__main__":
    main(sys.argv[1])
