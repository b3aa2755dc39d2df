"""`speculators train --plan` as the user types it."""

import json
import re

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.cost import Gpu
from speculators_cli.core.training.build import Kernels
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs
from tests.token_files import make_rows, write_tokens


def test_a_plan_says_what_the_run_then_does(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny.flags(epochs=3, keep_checkpoints=1)

    assert run(["train", "--plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert not tiny.save_path.exists()
    assert run(["train", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)

    assert plan["total_steps"] == report["total_steps"] == 3 * plan["steps_per_epoch"]
    saved = [f for f in tiny.save_path.iterdir() if f.is_dir() and not f.is_symlink()]
    assert plan["num_checkpoints"] >= len(saved) > 0
    last = tiny.save_path / "2"
    size = sum(f.stat().st_size for f in last.rglob("*.safetensors"))
    # What else lies there: headers of the two files, d2t, t2d, steps of the optimizer.
    assert plan["checkpoint_bytes"] == pytest.approx(size, rel=0.1)
    assert plan["host_copy_bytes"] == plan["checkpoint_bytes"]
    lines = read_metrics(tiny.save_path)
    last_step = next(x for x in reversed(lines) if x["split"] == "train")
    assert plan["supervised_fraction"] == pytest.approx(last_step["supervised_fraction"], abs=0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is unknown without a GPU")
def test_a_plan_without_a_gpu_leaves_out_time_and_memory(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--plan", *tiny.flags()]) == 0

    out, _ = capsys.readouterr()
    assert "time             only estimated for the fast kernels in bfloat16 on a GPU" in out
    assert "checkpoints" in out
    assert re.search(r"host memory +\S+ \S+ to write checkpoints from", out)


@pytest.mark.parametrize(
    ("flags", "num_shards"),
    [
        ([], 1),
        (["--nproc-per-node", "4"], 1),  # a tiny draft
        (["--nproc-per-node", "4", "--sharding", "shard"], 4),
        (["--nproc-per-node", "4", "--sharding", "replicate"], 1),
    ],
)
def test_a_plan_tells_the_sharding(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str], flags: list[str], num_shards: int
) -> None:
    assert run(["train", "--plan", "--json", *tiny.flags(), *flags]) == 0

    assert json.loads(capsys.readouterr().out)["plan"]["num_shards"] == num_shards


def test_a_plan_refuses_what_the_run_would(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.folder / "file"
    file.touch()

    assert run(["train", "--plan", *tiny.flags(save_path=file)]) == 2
    assert "--save-path" in capsys.readouterr().err


def test_a_plan_knows_the_window(tiny: TinyInputs, capsys: pytest.CaptureFixture[str]) -> None:
    work = []
    for window in (0, 5, 4, 1000):
        flags = tiny.flags(sliding_window=window)
        assert run(["train", "--plan", "--json", *flags]) == 0
        work.append(json.loads(capsys.readouterr().out)["plan"]["useful_tflop_per_step"])

    assert work[2] < work[1] < work[0] == work[3]


@pytest.mark.parametrize(("every", "max_steps"), [(4, None), (8, 8), (5, 5), (3, 11)])
def test_a_plan_counts_checkpoints_as_they_are_written(
    every: int, max_steps: int | None, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny.flags(checkpoint_every_steps=every, max_steps=max_steps)

    assert run(["train", "--plan", "--json", *flags]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]["num_checkpoints"]
    assert run(["train", *flags]) == 0

    saved = [f for f in tiny.save_path.iterdir() if f.is_dir() and not f.is_symlink()]
    assert planned == len(saved)


def test_a_plan_counts_the_processes_to_come(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(*extra: str) -> int:
        assert run(["train", "--plan", "--json", *extra, *tiny.flags()]) == 0
        found: int = json.loads(capsys.readouterr().out)["plan"]["total_steps"]
        return found

    assert steps() > steps("--nproc-per-node", "2") > 0


def test_a_plan_knows_capture_and_its_alternatives(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(40)
    tokens = write_tokens(tiny.folder / "tokens", rows)
    gpu = Gpu(flops=1e9, bandwidth=1e9)
    monkeypatch.setattr("speculators_cli.core.training.plan.find_gpu", lambda _: gpu)
    kernels = Kernels(are_fast=True, in_float8=False)
    monkeypatch.setattr("speculators_cli.core.training.plan._modelled_kernels", lambda *_: kernels)
    flags = tiny.flags(data_path=tokens, target_layer_ids="3,5,7", epochs=3)
    cache = ["--cache-dir", str(tiny.folder / "cache")]
    stored = tiny.flags(epochs=3)
    float8 = [*flags, "--capture-compute-dtype", "float8"]
    more = (flags, [*flags, *cache, "--cache-size", "200KB"], [*flags, *cache], float8, stored)

    plans = []
    for given in more:
        assert run(["train", "--plan", "--json", *given]) == 0
        plans.append(json.loads(capsys.readouterr().out)["plan"])

    *captures, in_float8, none = [plan["capture"] for plan in plans]
    assert none is None
    assert [c["cached_share"] for c in captures] == [0, pytest.approx(0.5, abs=0.45), 1]
    assert 0 < captures[1]["cache_bytes"] <= 200_000 < captures[2]["cache_bytes"]
    seconds = [c["seconds"] for c in captures]
    # Of three epochs, the last two are read where everything is kept.
    assert seconds[0] == pytest.approx(3 * seconds[2])
    assert seconds[0] > seconds[1] > seconds[2]
    assert seconds[0] == pytest.approx(1.65 * in_float8["seconds"])
    assert captures[0]["verifier_bytes_per_gpu"] == 2 * in_float8["verifier_bytes_per_gpu"]
    for plan in plans[:4]:
        assert plan["seconds"] > plan["capture"]["seconds"]
        assert plan["memory_terms_bytes"]["capture_weights"] > 0
    once = captures[0]["seconds_if_all_were_stored"]
    assert once == pytest.approx(plans[2]["seconds"])
    # 36 of 40 rows are trained on, with 3 aux layers and 24 numbers of 2 bytes.
    tokens_trained = sum(len(row.input_ids) for row in rows)
    assert captures[0]["stored_bytes"] == pytest.approx(4 * 24 * 2 * tokens_trained * 0.9, rel=0.2)
    for plan in captures:
        options = {option["name"]: option for option in plan["options"]}
        assert plan["disk"]["read_bytes_per_second"] > 0
        best = min(options.values(), key=lambda option: option["seconds"])
        assert plan["best_option"] == best["name"]
    assert set(options) == {"online", "stored", "stored in float8", "online with cache"}
    assert options["online with cache"]["seconds"] >= 0.99 * plans[2]["seconds"]
    assert not (tiny.folder / "cache").exists()
    names = {path.name for path in tokens.iterdir()}
    assert names == {"manifest.json", "tokens-00000.safetensors"}
    assert run(["train", "--plan", *more[1]]) == 0
    out = capsys.readouterr().out
    assert "if states were stored" in out
    assert "/s written" in out
    assert out.count("(best)") == 1


@pytest.mark.parametrize("given", [{}, {"algorithm": "dflash", "mask_token_id": 36}], ids=str)
def test_a_plan_with_products_in_float8_knows_memory_but_not_time(
    given: dict[str, object],
    tiny: TinyInputs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(flops=1e9, bandwidth=1e9)
    monkeypatch.setattr("speculators_cli.core.training.plan.find_gpu", lambda _: gpu)
    plans = []
    for in_float8 in (False, True):
        kernels = Kernels(are_fast=True, in_float8=in_float8)
        monkeypatch.setattr(
            "speculators_cli.core.training.plan._modelled_kernels", lambda *_, own=kernels: own
        )
        assert run(["train", "--plan", "--json", *tiny.flags(**given)]) == 0
        plans.append(json.loads(capsys.readouterr().out)["plan"])

    assert plans[0]["seconds"] > 0
    assert plans[1]["seconds"] is None
    assert plans[1]["memory_bytes_per_gpu"] > 0
    # Blocks keep their weights in float8; EAGLE-3 needs about the same memory.
    are_equal = plans[0]["memory_terms_bytes"] == plans[1]["memory_terms_bytes"]
    assert are_equal == (not given)
