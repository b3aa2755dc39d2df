"""The parts of a start, in the log and in the report."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training import start_up
from speculators_cli.core.training.run import train
from speculators_cli.core.training.start_up import (
    StartUp,
    count_process_seconds,
    find_import_hint,
)
from tests.recorded_progress import RecordedProgress
from tests.tiny_run import TinyInputs


def test_parts_add_up_to_the_time_that_has_passed() -> None:
    began_at = time.perf_counter()
    timer = StartUp(2.0)
    for part in ("samples", "draft", "samples"):
        time.sleep(0.02)
        timer.end(part)
    passed = time.perf_counter() - began_at

    assert list(timer.seconds) == ["imports", "samples", "draft"]
    assert timer.seconds["samples"] >= 0.04
    assert 2.06 <= sum(timer.seconds.values()) <= 2.0 + passed


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_the_age_of_a_process_is_counted_from_its_start() -> None:
    code = (
        "import time; time.sleep(0.5); "
        "from speculators_cli.core.training.start_up import count_process_seconds; "
        "print(count_process_seconds())"
    )

    began_at = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    passed = time.monotonic() - began_at

    # Ticks of the system's clock are 10 ms.
    assert 0.49 < float(done.stdout) < passed + 0.02


def test_the_age_of_a_process_may_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_up, "STAT", tmp_path / "missing")

    assert count_process_seconds() is None
    assert StartUp(count_process_seconds()).seconds == {}


@pytest.mark.parametrize(
    ("dont_write", "expected"),
    [(True, "Unset `PYTHONDONTWRITEBYTECODE`"), (False, "Set `PYTHONPYCACHEPREFIX` to a folder")],
)
def test_a_run_without_bytecode_hints_at_it(
    tiny: TinyInputs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dont_write: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.__spec__, "cached", str(tiny.folder / "missing.pyc"))
    monkeypatch.setattr(sys, "dont_write_bytecode", dont_write)

    assert run(["train", *tiny.flags(epochs=1, dry_run=True)]) == 0

    assert f"hint: {expected}" in capsys.readouterr().err


def test_bytecode_that_is_kept_needs_no_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept.pyc").touch()
    monkeypatch.setattr(torch.__spec__, "cached", str(tmp_path / "kept.pyc"))

    assert find_import_hint(torch) is None


def test_a_run_logs_its_start_once_and_reports_it(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--json", *tiny.flags(epochs=1)]) == 0

    out, err = capsys.readouterr()
    seconds = json.loads(out)["start_up_seconds"]
    parts = ["imports", "device", "samples", "save path", "verifier", "sample check", "draft"]
    assert list(seconds) == [*parts, "kernels", "first step"]
    assert all(value >= 0 for value in seconds.values())
    assert err.count("Start-up took ") == 1
    # After the line of the first step, which it includes.
    assert err.index("step 1/") < err.index("Start-up took ") < err.index("step 2/")


def test_a_run_of_the_library_has_no_imports(tiny: TinyInputs) -> None:
    report = train(tiny.settings(run={"epochs": 1}), progress=SilentProgress())

    assert next(iter(report.start_up_seconds)) == "device"
    assert sum(report.start_up_seconds.values()) < report.duration_seconds


def test_a_finished_run_has_no_first_step(trained: TinyInputs) -> None:
    progress = RecordedProgress()

    report = train(trained.settings(), progress=progress)

    assert report.was_already_finished
    assert "first step" not in report.start_up_seconds
    assert not [line for line in progress.infos if line.startswith("Start-up")]


# Each takes a second or more; PyTorch imports its compiler when an optimizer of its own is used.
HEAVY = {"transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"}


def test_training_on_one_rank_imports_no_more_than_it_needs() -> None:
    code = f"""
import sys
import torch
from speculators_cli.core import evaluated_training
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.settings.train import OptimizerSettings

module = torch.nn.Linear(3, 2)
optimizer = Optimizer(module, OptimizerSettings())
module(torch.ones(1, 3)).sum().backward()
optimizer.step(0.1)
print(sorted({HEAVY} & sys.modules.keys()))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
