"""Two ranks, on gloo or NCCL, against one rank on the same global batches."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs


def train(tiny: TinyInputs, save_path: Path, *, num_ranks: int, **changes: object) -> str:
    given = {"noise_std": 0.05, "scheduler": "none"} | changes
    flags = tiny.flags(save_path=save_path, **given)
    command = [sys.executable, "-m", "speculators_cli", "train", *flags]
    if num_ranks > 1:
        command += ["--nproc-per-node", str(num_ranks)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def largest_difference(one: Path, other: Path) -> float:
    """The largest absolute difference of any weight."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def gradient_norms(save_path: Path) -> list[float]:
    """Of the first steps, before their weights part in the last bits."""
    lines = read_metrics(save_path)
    return [line["grad_norm"] for line in lines if line["split"] == "train"][:4]


@pytest.mark.parametrize("sharding", ["shard", "replicate"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_two_ranks_equal_one_that_accumulates(
    tiny: TinyInputs, tmp_path: Path, device: str, sharding: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = {"device": device, "compute_dtype": "float32"}

    train(tiny, one, num_ranks=1, gradient_accumulation_steps=2, **same)
    train(tiny, two, num_ranks=2, sharding=sharding, **same)

    # AdamW does not see a gradient's scale: only its norm tells a sum from a mean.
    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    start = load_file(one / "0" / "model.safetensors")["fc.weight"]
    moved = (load_file(one / "1" / "model.safetensors")["fc.weight"] - start).abs().max()
    # AdamW's steps of 3e-3 turn on gradients that float32 sums in another order.
    assert largest_difference(one / "1", two / "1") < 2e-4
    assert moved > 5e-3


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_two_ranks_with_fast_kernels_equal_one_with_plain_ones(
    tiny: TinyInputs, tmp_path: Path, device: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = {"device": device, "compute_dtype": "float32", "max_steps": 2, "total_seq_len": 16}
    same["noise_std"] = 0  # devices and kernels draw different numbers

    train(tiny, one, num_ranks=1, kernels="plain", gradient_accumulation_steps=2, **same)
    train(tiny, two, num_ranks=2, kernels="fast", **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    # As above, after two steps.
    assert largest_difference(one / "step-2", two / "step-2") < 2e-4


FAST = pytest.param(
    "dflash", "fast", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
)


@pytest.mark.parametrize(("algorithm", "kernels"), [("dflash", "plain"), FAST, ("dspark", "plain")])
def test_two_ranks_draw_the_anchors_of_one(
    tiny: TinyInputs, tmp_path: Path, algorithm: str, kernels: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same: dict[str, object] = {"algorithm": algorithm, "num_layers": 2, "num_anchors": 12}
    same |= {"mask_token_id": 1, "block_size": 4, "noise_std": 0.0}

    train(tiny, one, num_ranks=1, gradient_accumulation_steps=2, kernels="plain", **same)
    train(tiny, two, num_ranks=2, kernels=kernels, **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    start = load_file(one / "0" / "model.safetensors")["fc.weight"]
    moved = (load_file(one / "1" / "model.safetensors")["fc.weight"] - start).abs().max()
    # As above.
    assert largest_difference(one / "1", two / "1") < 2e-4
    assert moved > 1e-3


def test_a_run_goes_on_with_another_number_of_ranks(tiny: TinyInputs, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    train(tiny, whole, num_ranks=2)
    train(tiny, parts, num_ranks=2, max_steps=2)
    messages = train(tiny, parts, num_ranks=1)

    assert "Each rank accumulates 2 packed sequences" in messages
    assert largest_difference(whole / "1", parts / "1") < 2e-4
    tensors = load_file(whole / "1" / "trainer" / "optimizer.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_goes_on_with_four_ranks_and_two(tiny: TinyInputs, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    train(tiny, whole, num_ranks=4)
    train(tiny, parts, num_ranks=1, gradient_accumulation_steps=4, max_steps=1)
    train(tiny, parts, num_ranks=4, max_steps=2)
    train(tiny, parts, num_ranks=2, max_steps=3)
    train(tiny, parts, num_ranks=1)

    assert largest_difference(whole / "1", parts / "1") < 2e-4


@pytest.mark.parametrize("rank", ["0", None])
def test_a_rank_leaves_without_what_libraries_do_at_exit(rank: str | None) -> None:
    script = (
        "import atexit, sys; from speculators_cli import __main__ as program; "
        "program.run = lambda argv: atexit.register(print, 'at exit') and 0; program.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    if rank is not None:
        environment["RANK"] = rank

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )

    assert ("at exit" in done.stdout) == (rank is None)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">/dev/full"])
def test_a_command_ends_with_its_code_whatever_takes_its_output(redirection: str) -> None:
    script = (
        "import sys; from speculators_cli import __main__ as program; "
        "program.run = lambda argv: (sys.stdout or sys.stderr).write('done') and 3; program.main()"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {redirection}"

    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, env=environment
    )

    assert done.returncode == 3
    assert done.stderr in ("", "done")
