"""Two ranks, on gloo or NCCL, against one rank on the same global batches."""

import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file

from tests.chat_verifier import write_rows, write_word_verifier
from tests.fork_server import ForkServer
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs
from tests.token_files import make_rows, write_tokens


class Train(Protocol):
    """Trains in processes of their own; returns what they print on stderr."""

    def __call__(self, save_path: Path, *, num_ranks: int, **changes: object) -> str: ...


@pytest.fixture
def train(fork_server: ForkServer, tiny: TinyInputs) -> Train:
    def run(save_path: Path, *, num_ranks: int, **changes: object) -> str:
        given = {"noise_std": 0.05, "scheduler": "none", "sharding": "shard"} | changes
        flags = tiny.flags(save_path=save_path, **given)
        done = fork_server.run("speculators_cli", "train", *flags, num_ranks=num_ranks)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


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
    train: Train, tmp_path: Path, device: str, sharding: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = {"device": device, "compute_dtype": "float32"}

    train(one, num_ranks=1, gradient_accumulation_steps=2, **same)
    train(two, num_ranks=2, sharding=sharding, **same)

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
    train: Train, tmp_path: Path, device: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = {"device": device, "compute_dtype": "float32", "max_steps": 2, "total_seq_len": 16}
    same["noise_std"] = 0  # devices and kernels draw different numbers

    train(one, num_ranks=1, kernels="plain", gradient_accumulation_steps=2, **same)
    train(two, num_ranks=2, kernels="fast", **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    # As above, after two steps.
    assert largest_difference(one / "step-2", two / "step-2") < 2e-4


FAST = pytest.param(
    "dflash", "fast", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
)


@pytest.mark.parametrize(("algorithm", "kernels"), [("dflash", "plain"), FAST, ("dspark", "plain")])
def test_two_ranks_draw_the_anchors_of_one(
    train: Train, tmp_path: Path, algorithm: str, kernels: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same: dict[str, object] = {"algorithm": algorithm, "num_layers": 1, "num_anchors": 6}
    same |= {"mask_token_id": 1, "block_size": 4, "noise_std": 0.0}
    # In an interpreter, a step takes seconds.
    same |= {"max_steps": 2, "total_seq_len": 16, "checkpoint_every_steps": 1}

    train(one, num_ranks=1, gradient_accumulation_steps=2, kernels="plain", **same)
    train(two, num_ranks=2, kernels=kernels, **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    start = load_file(one / "step-1" / "model.safetensors")["fc.weight"]
    moved = (load_file(one / "step-2" / "model.safetensors")["fc.weight"] - start).abs().max()
    # As above.
    assert largest_difference(one / "step-2", two / "step-2") < 2e-4
    assert moved > 1e-3


MASKS = [
    ("plain", "shard"),
    ("plain", "replicate"),
    pytest.param(
        "fast",
        "shard",
        marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    ),
]


@pytest.mark.parametrize(("kernels", "sharding"), MASKS)
def test_two_ranks_train_the_mask_and_the_depths_of_one(
    train: Train, tmp_path: Path, kernels: str, sharding: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    num_layers = 1 if kernels == "fast" else 2  # in an interpreter, a step takes seconds
    same: dict[str, object] = {"algorithm": "peagle", "num_layers": num_layers, "ttt_steps": 3}
    same |= {"mask_token_id": 1, "noise_std": 0.0, "max_steps": 2, "total_seq_len": 16}
    same |= {"down_sample_ratio": 0.6, "num_anchors": 8}

    train(one, num_ranks=1, gradient_accumulation_steps=2, kernels="plain", **same)
    train(two, num_ranks=2, kernels=kernels, sharding=sharding, **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    # One rank has the whole mask, which has one row.
    masks = [load_file(x / "step-2" / "model.safetensors")["mask_hidden"] for x in (one, two)]
    assert masks[0].shape == (1, 1, 72)
    assert masks[0].abs().max() > 2e-3
    # As above.
    assert largest_difference(one / "step-2", two / "step-2") < 2e-4


def test_two_ranks_that_capture_equal_one(train: Train, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    rows = make_rows(24, longest=60)
    same = {"data_path": write_tokens(tmp_path / "tokens", rows), "target_layer_ids": "3,5,7"}

    train(one, num_ranks=1, gradient_accumulation_steps=2, **same)
    train(two, num_ranks=2, **same)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    start = load_file(one / "0" / "model.safetensors")["fc.weight"]
    moved = (load_file(one / "1" / "model.safetensors")["fc.weight"] - start).abs().max()
    # As above.
    assert largest_difference(one / "1", two / "1") < 2e-4
    assert moved > 5e-3


def test_two_ranks_that_share_a_verifier_equal_one_that_holds_it(
    train: Train, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    rows = make_rows(24, longest=60)
    same = {"data_path": write_tokens(tmp_path / "tokens", rows), "target_layer_ids": "3,5,7"}
    cache = {"cache_dir": tmp_path / "cache", "cache_size": "100KB"}

    train(one, num_ranks=1, gradient_accumulation_steps=2, **same)
    train(two, num_ranks=2, shard_verifier=True, **same, **cache)

    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-3)
    start = load_file(one / "0" / "model.safetensors")["fc.weight"]
    moved = (load_file(one / "1" / "model.safetensors")["fc.weight"] - start).abs().max()
    # As above; float32 rounds the packed documents' states differently, too.
    assert largest_difference(one / "1", two / "1") < 2e-4
    assert moved > 5e-3
    assert 0 < len(list((tmp_path / "cache").rglob("*.pt"))) < 24


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_a_sharded_verifier_has_the_states_of_a_whole_one(
    fork_server: ForkServer, tiny: TinyInputs, device: str
) -> None:
    program = "tests.distributed.sharded_capture"

    done = fork_server.run(program, tiny.verifier_dir, device, num_ranks=2)

    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    for line in lines:
        assert [found["are_equal"] for found in line["models"]] == [[True] * 4] * 2
    # Of 9 layers, 9 halves and 3 at a time are on a rank; of 8 layers, 8 halves and 2. Embedding
    # and LM head, 37 x 24 in float32 each, and a norm are whole.
    rest = 4 * (2 * 37 * 24 + 24)
    for line in lines:
        for found, share in zip(line["models"], (1 / 2 + 3 / 9, 1 / 2 + 2 / 8), strict=True):
            expected = (found["whole_bytes"] - rest) * share + rest
            # Each weight begins at a multiple of 256 bytes.
            assert found["own_bytes"] == pytest.approx(expected, rel=0.03)


def test_two_ranks_evaluate_the_prompts_of_one(train: Train, tmp_path: Path) -> None:
    verifier = write_word_verifier(tmp_path / "worded")
    rows = [{"prompt": " ".join(f"w{5 + (i + k) % 30}" for k in range(3 + i))} for i in range(5)]
    given = {
        "verifier_name_or_path": verifier,
        "evaluate_prompts": write_rows(tmp_path / "prompts.jsonl", rows),
        "evaluate_max_new_tokens": 12,
        "epochs": 1,
    }
    one, two = tmp_path / "one", tmp_path / "two"

    train(one, num_ranks=1, gradient_accumulation_steps=2, **given)
    train(two, num_ranks=2, **given)

    (expected,), (found,) = read_metrics(one, "val"), read_metrics(two, "val")
    keys = [key for key in expected if key.startswith("evaluated")]
    # Weights part in the last bits, tokens do not.
    assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}
    assert found["evaluated_passes"] > 10


def test_a_run_goes_on_with_another_number_of_ranks(train: Train, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    train(whole, num_ranks=2)
    train(parts, num_ranks=2, max_steps=1)
    train(parts, num_ranks=2, max_steps=2, sharding="replicate")
    messages = train(parts, num_ranks=1)

    assert "Each rank accumulates 2 packed sequences" in messages
    assert largest_difference(whole / "1", parts / "1") < 2e-4
    tensors = load_file(whole / "1" / "trainer" / "optimizer.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_goes_on_with_four_ranks_and_two(train: Train, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    train(whole, num_ranks=4)
    train(parts, num_ranks=1, gradient_accumulation_steps=4, max_steps=1)
    train(parts, num_ranks=4, max_steps=2)
    train(parts, num_ranks=2, max_steps=3)
    train(parts, num_ranks=1)

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
