"""Training with the demo's verifier in vLLM equals training with it in transformers.

docs/contributing.md says how to install the engine; `VLLM_PYTHON` names its interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.demo.demo import VERIFIER_DIR
from tests.run_files import read_metrics
from tests.token_files import make_rows, write_tokens

pytestmark = pytest.mark.vllm

LAYER_IDS = (2, 4, 5)
FLAGS = "--max-model-len 512 --max-num-batched-tokens 128 --enforce-eager"
# On a CPU, memory is that of the machine, which others use as well.
FLAGS += " --gpu-memory-utilization 0.2"
SECONDS = 900


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_rows(24, shortest=20, longest=60)
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens", rows)


def train(tokens: Path, save_path: Path, *more: str) -> list[dict[str, Any]]:
    """Losses and gradient norms of the steps of one epoch."""
    flags = [
        *("--verifier-name-or-path", VERIFIER_DIR, "--data-path", tokens),
        *("--save-path", save_path, "--log-dir", save_path / "logs"),
        *("--target-layer-ids", ",".join(map(str, LAYER_IDS)), "--full-vocab"),
        *("--epochs", "1", "--total-seq-len", "128", "--device", "cpu", "--capture", "online"),
        *("--log-every-steps", "1", "--scheduler", "none", *more),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "speculators_cli", "train", *map(str, flags)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return read_metrics(save_path, "train")


def test_steps_equal_those_of_transformers_on_one_rank_and_on_two(
    tokens: Path, tmp_path: Path
) -> None:
    vllm = (
        *("--capture-engine", "vllm", "--vllm-python", os.environ["VLLM_PYTHON"]),
        *("--vllm-args", FLAGS),
    )
    accumulated = ("--gradient-accumulation-steps", "2")

    expected = train(tokens, tmp_path / "transformers", *accumulated)
    one = train(tokens, tmp_path / "one", *accumulated, *vllm)
    two = train(tokens, tmp_path / "two", "--nproc-per-node", "2", *vllm)

    assert len(expected) >= 3
    for found in (one, two):
        assert len(found) == len(expected)
        assert all(0 < line["capture_share"] < 1 for line in found)
        # States differ by float32 rounding, 6e-5 of 50; AdamW's first steps turn on the signs of
        # gradients near zero. Another layer or norm moves the first loss by more than a tenth.
        for key, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2)):
            pairs = zip(found, expected, strict=True)
            assert all(a[key] == pytest.approx(b[key], rel=tolerance) for a, b in pairs), key
