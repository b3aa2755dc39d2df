"""`generate-data` on two GPUs: a shard each, or the layers of one verifier spread over both."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.demo.demo import read_prompts
from tests.chat_verifier import write_chat_verifier, write_rows
from tests.generated_samples import sample_files


def generate(folder: Path, out: str, *flags: object) -> dict[str, Any]:
    """Run the command on prompts in `folder`; returns its report."""
    command = [sys.executable, "-m", "speculators_cli", "generate-data", folder / "prompts.jsonl"]
    command += ["--verifier-name-or-path", folder / "verifier", "--output-dir", folder / out]
    command += ["--regenerate", "--max-new-tokens", 16, "--shard-size", 4, "--device", "cuda"]
    command += [*flags, "--json"]
    done = subprocess.run([str(x) for x in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_chat_verifier(tmp_path / "verifier")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in read_prompts()[:12]])
    return tmp_path


def read_states(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): torch.load(file, weights_only=True)
        for file in sample_files(folder)
    }


@pytest.mark.multi_gpu
@pytest.mark.parametrize("flags", [("--nproc-per-node", 2), ("--device-map", "auto")])
def test_two_gpus_write_the_samples_of_one(folder: Path, flags: tuple[object, ...]) -> None:
    dtype = ("--dtype", "float32")
    one = generate(folder, "one", *dtype)

    two = generate(folder, "two", *dtype, *flags)

    assert one["num_samples"] == 12
    assert {two[key] for key in ("num_samples", "num_tokens", "num_supervised_tokens")} == {
        one[key] for key in ("num_samples", "num_tokens", "num_supervised_tokens")
    }
    samples, others = read_states(folder / "one"), read_states(folder / "two")
    assert samples.keys() == others.keys()
    for name, sample in samples.items():
        assert sample.keys() == others[name].keys()
        for key, value in sample.items():
            torch.testing.assert_close(others[name][key], value, rtol=1e-4, atol=1e-4)
