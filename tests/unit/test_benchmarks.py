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
    assert parts >= {"rms_norm", "rotate", "joint_attention", "swiglu", "linear_kl", "optimizer"}
    assert all(line["fast"]["launch_ms"] > 0 for line in lines)
