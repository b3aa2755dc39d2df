"""The benchmark scripts of docs/, as a user starts them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_each_part_of_the_fast_step_is_timed() -> None:
    flags = "--shape smollm2-135m --total-seq-len 16 --draft-vocab-size 200"

    done = subprocess.run(
        [sys.executable, BENCHMARKS / "parts.py", *flags.split()],
        capture_output=True,
        text=True,
        check=True,
    )

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    parts = {line["part"] for line in lines}
    expected = {"rms_norm", "rotate", "joint_attention", "gated_linear", "linear_kl", "optimizer"}
    assert parts >= expected
    assert all(line["fast"]["launch_ms"] > 0 for line in lines)


def test_the_start_of_a_run_and_its_saves_are_timed(tmp_path: Path) -> None:
    script = str(BENCHMARKS / "start_up.py")
    flags = ["--shape", "smollm2-135m", "--total-seq-len", "16", "--steps", "4", "--every", "2"]

    lines = [
        subprocess.run(
            [sys.executable, script, command, str(tmp_path / "inputs"), *flags],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in ("make", "run")
    ]

    timed = json.loads(lines[1])
    assert next(iter(timed["start_up_seconds"])) == "imports"
    assert list(timed["start_up_seconds"])[-1] == "first step"
    assert timed["start_up"] < timed["total"]
    assert [line.split("`")[1] for line in timed["saves"]] == ["step-2", "0"]
    assert timed["step_ms"] > 0
    assert timed["step_ms_while_writing"] > 0


def test_ranks_are_compared_with_and_without_accumulation() -> None:
    flags = "--shape smollm2-135m --total-seq-len 16 --draft-vocab-size 200 --device cpu --steps 2"

    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            BENCHMARKS / "ranks.py",
            *flags.split(),
            *("--accumulation", "1", "2"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    one, two = (json.loads(line) for line in done.stdout.splitlines())
    assert one["gradient_accumulation_steps"] == 1
    assert two["gradient_accumulation_steps"] == 2
    assert one["num_ranks"] == one["num_shards"] == 2
    assert two["step_ms_max"] > one["step_ms_min"] > 0
