"""`speculators bench` as the user types it."""

import json
from importlib.util import find_spec
from unittest.mock import Mock

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.training.optimizer_step import OptimizerStep
from tests.tiny_drafts import KERNELS
from tests.tiny_run import TinyInputs

# As small as its kernels allow: the interpreter takes its time for each row.
SEQ_LENS = {"plain": "64", "fast": "16"}
SMALL = ["--draft-vocab-size", "30", "--total-seq-len", "64", "--steps", "2", "--warmup-steps", "1"]


def test_a_verifier_of_ones_own_is_measured(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    code = run(["bench", "--json", *flags])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["command"] == "bench"
    assert report["kernels"] == "plain"
    assert report["step_ms_min"] <= report["step_ms"] <= report["step_ms_max"]
    assert report["tokens_per_second"] == pytest.approx(64 / report["step_ms"] * 1e3)
    assert 0.5 < report["supervised_fraction"] < 0.7
    assert 0 < report["loss"] < 10
    assert report["split_ms"] is None
    assert report["launch_ms"] is None


def test_a_window_is_measured(tiny: TinyInputs, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]
    work = []
    for window in ("0", "6"):
        assert run(["bench", "--json", *flags, "--sliding-window", window]) == 0
        work.append(json.loads(capsys.readouterr().out)["useful_tflop"])

    assert work[1] < work[0]


@pytest.mark.parametrize("kernels", KERNELS)
def test_samples_from_disk_are_trained_on(
    kernels: str, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]
    flags += ["--total-seq-len", SEQ_LENS[kernels]]

    code = run(["bench", *flags, "--data-path", str(tiny.data_dir), "--kernels", kernels])

    out, _ = capsys.readouterr()
    assert code == 0
    assert f"{kernels} kernels" in out
    assert "waiting for data" in out


def test_capture_is_timed_apart(tiny: TinyInputs, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    reports = []
    for more in ([], ["--capture"], ["--capture", "--disk-dir", str(tiny.folder)]):
        assert run(["bench", "--json", *flags, *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))

    plain, captured, compared = reports
    assert (captured["disk"], captured["stored"]) == (None, [])
    assert compared["disk"]["read_bytes_per_second"] > 0
    whole, in_float8 = compared["stored"]
    # Rows of 24 values: 2 bytes each, or 1 and a scale of 4 for all.
    assert whole["num_bytes"] * 28 == in_float8["num_bytes"] * 48 > 0
    assert whole["step_ms"] < compared["step_ms"]
    assert plain["capture_ms"] is None
    assert 0 < captured["capture_ms"] < captured["step_ms_max"]
    assert 0 < captured["capture_share"] < 1
    assert captured["tokens_per_second"] == pytest.approx(64 / captured["step_ms"] * 1e3)
    assert 0 < captured["loss"] < 10


def test_samples_of_another_size_are_refused(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["bench", "--shape", "smollm2-135m", "--data-path", str(tiny.data_dir), *SMALL])

    assert code == 3
    assert "hidden size 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--full-vocab --draft-vocab-size 20",
        "--verifier-name-or-path x --shape qwen3-8b",
        "--data-path . --supervised-fraction 0.2",
        "--data-path . --num-documents 1",
        "--total-seq-len 64 --num-documents 17",
        "--disk-dir .",
        "--gemm-dtype float8 --kernels plain",
        "--gemm-dtype float8 --compute-dtype float32",
    ],
)
def test_what_would_be_ignored_is_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["bench", *flags.split()])

    assert code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0.6, 0.2, 0.1])
def test_a_short_sequence_is_supervised_as_asked(
    fraction: float, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    code = run(["bench", "--json", *flags, "--supervised-fraction", str(fraction)])

    assert code == 0
    found = json.loads(capsys.readouterr().out)["supervised_fraction"]
    assert found == pytest.approx(fraction, abs=0.05)


def test_more_steps_than_tokens_are_timed(tiny: TinyInputs) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    assert run(["bench", *flags, "--total-seq-len", "16", "--ttt-steps", "20"]) == 0


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")],
)
def test_too_little_memory_is_the_machines_fault(
    error: Exception,
    tiny: TinyInputs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OptimizerStep, "run", Mock(side_effect=error))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    assert run(["bench", *flags]) == 5
    assert "--total-seq-len" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_fast_kernels_are_refused_without_a_gpu(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    code = run(["bench", *flags, "--kernels", "fast"])

    assert code == 5
    assert "`--kernels fast`: they require a GPU" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_products_in_float8_are_refused_without_a_gpu(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    code = run(["bench", *flags, "--gemm-dtype", "float8"])

    assert code == 5
    error = capsys.readouterr().err
    assert "`--gemm-dtype float8` needs the fast kernels: they require a GPU" in error
    assert "Leave out `--gemm-dtype float8`" in error


def test_an_algorithm_without_products_in_float8_is_refused(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ALGORITHMS["dflash"], "multiplies_in_float8", False)
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    code = run(["bench", *flags, "--algorithm", "dflash", "--gemm-dtype", "float8"])

    assert code == 5
    assert "algorithm `dflash` has none in float8" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_products_in_float8_are_measured(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]
    flags += ["--total-seq-len", SEQ_LENS["fast"]]

    code = run(["bench", "--json", *flags, "--gemm-dtype", "float8"])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["kernels"], report["gemm_dtype"]) == ("fast", "float8")
