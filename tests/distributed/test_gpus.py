"""Two GPUs over NCCL: the losses of one, checkpoints for any number of ranks, and lost ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from tests.ranks import choose_port, torchrun
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs, write_inputs

pytestmark = pytest.mark.multi_gpu

COMMAND = (sys.executable, "-m", "speculators_cli")
NUM_STEPS = 20
TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Done:
    """How processes ended, and the standard error of the first."""

    codes: list[int]
    errors: str


def train(
    tiny: TinyInputs,
    name: str,
    *,
    num_ranks: int = 2,
    max_steps: int = NUM_STEPS,
    **changes: object,
) -> Done:
    given: dict[str, object] = {"save_path": tiny.folder / name, "device": "cuda", "lr": 3e-4}
    given |= {"epochs": 40, "max_steps": max_steps, "compute_dtype": "bfloat16", "noise_std": 0.05}
    given["scheduler"] = "none"
    flags = tiny.flags(**given | changes)
    if num_ranks > 1:
        flags += ["--nproc-per-node", str(num_ranks)]
    done = subprocess.run([*COMMAND, "train", *flags], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Done([done.returncode], done.stderr)


def train_in_parts(tiny: TinyInputs, name: str, *, last_ranks: int) -> Done:
    """Two ranks that shard, two that do not, then one or two."""
    train(tiny, name, max_steps=6, sharding="shard")
    train(tiny, name, max_steps=12, sharding="replicate")
    return train(tiny, name, num_ranks=last_ranks)


def lose(tiny: TinyInputs, name: str) -> Done:
    """A run of two ranks without a launcher, the second of which is lost."""
    flags = tiny.flags(
        save_path=tiny.folder / name, device="cuda", sharding="shard", epochs=4000,
        timeout_seconds=TIMEOUT_SECONDS,
    )  # fmt: skip
    port = choose_port()
    command = [sys.executable, "-m", "tests.distributed.misbehaving", name, "train", *flags]
    first, lost = (
        subprocess.Popen(
            command,
            env={**os.environ, **torchrun(rank, 2, port)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    )
    try:
        _, errors = first.communicate(timeout=120)
    finally:
        for process in (first, lost):
            process.kill()
    lost.communicate()
    return Done([first.returncode, lost.returncode], errors)


def stop(tiny: TinyInputs, name: str) -> Done:
    """A launcher that receives SIGTERM after a few steps."""
    flags = tiny.flags(save_path=tiny.folder / name, device="cuda", sharding="shard", epochs=4000)
    process = subprocess.Popen(
        [*COMMAND, "train", "--nproc-per-node", "2", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics_file, until = tiny.folder / name / "metrics.jsonl", time.monotonic() + 120
    while not (metrics_file.exists() and metrics_file.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return Done([process.returncode], errors)


@dataclass(frozen=True)
class Runs:
    """What runs that were started together left."""

    folder: Path
    done: dict[str, Done]

    def losses(self, name: str) -> list[float]:
        """Of each step."""
        lines = read_metrics(self.folder / name)
        return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    tiny = write_inputs(tmp_path_factory.mktemp("gpus"))
    acts: dict[str, Callable[[str], Done]] = {
        "one": lambda name: train(tiny, name, num_ranks=1, gradient_accumulation_steps=2),
        "shard": lambda name: train(tiny, name, sharding="shard"),
        "replicate": lambda name: train(tiny, name, sharding="replicate"),
        "parts_on_one": lambda name: train_in_parts(tiny, name, last_ranks=1),
        "parts_on_two": lambda name: train_in_parts(tiny, name, last_ranks=2),
        "killed": lambda name: lose(tiny, name),
        "asleep": lambda name: lose(tiny, name),
        "stopped": lambda name: stop(tiny, name),
    }
    with ThreadPoolExecutor(len(acts)) as pool:
        started = {name: pool.submit(act, name) for name, act in acts.items()}
    return Runs(tiny.folder, {name: future.result() for name, future in started.items()})


@pytest.mark.parametrize("name", ["shard", "replicate", "parts_on_one", "parts_on_two"])
def test_losses_in_bfloat16_are_those_of_one_gpu(runs: Runs, name: str) -> None:
    expected, found = runs.losses("one"), runs.losses(name)

    assert len(expected) == NUM_STEPS
    assert expected[-1] < expected[0]
    # Gradients are summed in another order; weights are rounded to bfloat16.
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("killed", "Rank 1 died or hangs: no sign of life"),
        ("asleep", f"Rank 1 did not arrive within {TIMEOUT_SECONDS} s"),
    ],
)
def test_a_lost_rank_is_named_by_the_other(runs: Runs, name: str, message: str) -> None:
    done = runs.done[name]

    assert f"error: {message}" in done.errors
    assert done.codes[0] == 5
    assert done.codes[1] != 0


def test_a_signal_to_the_launcher_saves_the_state(runs: Runs) -> None:
    (saved,) = find_checkpoints(runs.folder / "stopped")[-1:]

    assert runs.done["stopped"].codes == [143]
    assert saved.state.step > 0
    assert f"saved as `{saved.folder.name}`" in runs.done["stopped"].errors
