"""The benchmark scripts of docs/, as a user starts them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ForkServer
from tests.small_shape import NAME

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


def run(fork_server: ForkServer, name: str, *flags: object, num_ranks: int = 1) -> list[Any]:
    """The lines that a script prints."""
    program = ("tests.small_shape", BENCHMARKS / f"{name}.py")
    done = fork_server.run(*program, "--shape", NAME, *flags, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_each_part_of_the_fast_step_is_timed(fork_server: ForkServer) -> None:
    flags = "--total-seq-len 16 --draft-vocab-size 200"

    lines = run(fork_server, "parts", *flags.split())

    parts = {line["part"] for line in lines}
    expected = {"rms_norm", "rotate", "joint_attention", "gated_linear", "linear_kl", "optimizer"}
    assert parts >= expected
    assert all(line["fast"]["launch_ms"] > 0 for line in lines)


def test_the_start_of_a_run_and_its_saves_are_timed(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    flags = ["--total-seq-len", "16", "--steps", "4", "--every", "2"]

    run(fork_server, "start_up", *flags, "make", tmp_path / "inputs")
    (timed,) = run(fork_server, "start_up", *flags, "run", tmp_path / "inputs")

    assert next(iter(timed["start_up_seconds"])) == "imports"
    assert list(timed["start_up_seconds"])[-1] == "first step"
    assert timed["start_up"] < timed["total"]
    assert [line.split("`")[1] for line in timed["saves"]] == ["step-2", "0"]
    assert timed["step_ms"] > 0
    assert timed["step_ms_while_writing"] > 0


def test_ranks_are_compared_with_and_without_accumulation(fork_server: ForkServer) -> None:
    flags = "--total-seq-len 16 --draft-vocab-size 200 --device cpu --steps 2"

    one, two = run(fork_server, "ranks", *flags.split(), "--accumulation", 1, 2, num_ranks=2)

    assert one["gradient_accumulation_steps"] == 1
    assert two["gradient_accumulation_steps"] == 2
    assert one["num_ranks"] == one["num_shards"] == 2
    assert two["step_ms_max"] > one["step_ms_min"] > 0
