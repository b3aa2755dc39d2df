"""A stop signal: the step is finished, the state saved, no step lost."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.data.loader import BatchLoader
from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.errors import StoppedError
from speculators_cli.core.progress import SilentProgress, StepReport
from speculators_cli.core.signals import SAME_PRESS_SECONDS, STOP_SIGNALS, StopSignals
from speculators_cli.core.training.run import train
from speculators_cli.core.training.trainer import Trainer
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs


class Signaller(SilentProgress):
    """Sends a signal to this process once a step is told of."""

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step

    def trained(self, report: StepReport) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_and_the_next_run_goes_on_as_if_there_was_none(
    tiny: TinyInputs, trained_once: Path, number: signal.Signals
) -> None:
    with pytest.raises(StoppedError) as stopped:
        train(tiny.settings(), progress=Signaller(number, step=3))
    saved = find_checkpoints(tiny.save_path)
    train(tiny.settings(), progress=SilentProgress())

    assert stopped.value.exit_code == 128 + number
    assert [(c.folder.name, c.state.step) for c in saved] == [("step-3", 3)]
    ends = [find_checkpoints(path)[-1] for path in (tiny.save_path, trained_once)]
    weights, expected = (end.read_tensors() for end in ends)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_run_stopped_in_its_last_step_still_ends_its_last_epoch(tiny: TinyInputs) -> None:
    last = train(tiny.settings(run={"save_path": tiny.folder / "whole"}), progress=SilentProgress())

    with pytest.raises(StoppedError):
        train(tiny.settings(), progress=Signaller(signal.SIGTERM, step=last.total_steps))
    report = train(tiny.settings(), progress=SilentProgress())

    assert (tiny.save_path / "1" / "model.safetensors").exists()
    assert report.step == last.total_steps
    assert report.validation_loss == last.validation_loss
    again = train(tiny.settings(), progress=SilentProgress())
    assert again.was_already_finished


def signal_at(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    """Let a call of a function, counted from 1, send SIGTERM to this process first."""
    module, _, name = target.rpartition(".")
    owner = pytest.importorskip(module) if not module.endswith("Loader") else BatchLoader
    real, calls = getattr(owner, name), count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def end_of(tiny: TinyInputs) -> dict[str, Any]:
    """What the run wrote of its end."""
    content: dict[str, Any] = json.loads((tiny.save_path / "result.json").read_text())
    return content


def test_a_signal_while_validating_saves_a_state_that_is_validated_on_resume(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.settings(run={"save_path": tiny.folder / "whole"})
    expected = train(whole, progress=SilentProgress())

    with monkeypatch.context() as patch:
        signal_at(patch, "speculators_cli.core.training.trainer.drop_non_finite", call=1)
        with pytest.raises(StoppedError) as stopped:
            train(tiny.settings(), progress=SilentProgress())
    saved = find_checkpoints(tiny.save_path)
    ended = end_of(tiny)
    report = train(tiny.settings(), progress=SilentProgress())

    steps = expected.total_steps // 2
    assert [(c.folder.name, c.state.step_in_epoch) for c in saved] == [(f"step-{steps}", steps)]
    assert (stopped.value.exit_code, ended["exit_code"]) == (128 + 15, 128 + 15)
    lines = [read_metrics(folder) for folder in (tiny.save_path, whole.run.save_path)]
    val = [[x["loss"] for x in part if x["split"] == "val"] for part in lines]
    assert val[0] == val[1]
    assert len(val[0]) == 2
    assert report.validation_loss == expected.validation_loss


def test_a_signal_while_samples_are_waited_for_saves_the_step_before(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, "BatchLoader._take", call=3)

    with pytest.raises(StoppedError, match="after step 2, saved as `step-2`"):
        train(tiny.settings(), progress=SilentProgress())

    assert [c.state.step for c in find_checkpoints(tiny.save_path)] == [2]


def test_a_signal_before_the_first_new_step_keeps_the_checkpoint_that_there_is(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny.settings(run={"epochs": 1}), progress=SilentProgress())
    signal_at(monkeypatch, "BatchLoader._take", call=1)

    with pytest.raises(StoppedError, match="saved as `0`"):
        train(tiny.settings(), progress=SilentProgress())

    assert [c.folder.name for c in find_checkpoints(tiny.save_path)] == ["0"]


@pytest.mark.parametrize(
    "target",
    ["run.read_inputs", "build.load_frozen_verifier", "build.check_samples", "build.build_loader"],
)
def test_a_signal_before_the_first_step_ends_at_once_and_is_written_down(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    signal_at(monkeypatch, f"speculators_cli.core.training.{target}", call=1)

    with pytest.raises(StoppedError) as stopped:
        train(tiny.settings(), progress=SilentProgress())

    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert end_of(tiny)["exit_code"] == 128 + signal.SIGTERM
    assert find_checkpoints(tiny.save_path) == []


def test_a_dry_run_that_is_stopped_writes_nothing(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, "speculators_cli.core.training.build.build_loader", call=1)

    with pytest.raises(StoppedError):
        train(tiny.settings(), progress=SilentProgress(), dry_run=True)

    assert not tiny.save_path.exists()


def test_a_signal_ends_any_command_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_at(monkeypatch, "speculators_cli.core.environment.describe_environment", call=1)

    assert run(["env"]) == 128 + signal.SIGTERM
    assert capsys.readouterr() == ("", "error: Stopped by signal 15\n")


def test_handlers_are_put_back_however_training_ends(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    between = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.setattr(Trainer, "fit", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny.settings(), progress=SilentProgress())

    assert between == before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert end_of(tiny) == {
        "error": "Unexpected ZeroDivisionError: division by zero",
        "hint": "Rerun with `--verbose` and report the traceback",
        "exit_code": 1,
    }


def test_an_ignored_hangup_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, old)


def test_training_in_another_thread_handles_no_signals(tiny: TinyInputs) -> None:
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(
            train, tiny.settings(run={"max_steps": 1}), progress=SilentProgress()
        ).result()

    assert report.step == 1


def test_a_run_takes_the_record_of_the_one_before_away(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny.settings(run={"max_steps": 1}), progress=SilentProgress())
    seen = []
    monkeypatch.setattr(
        Trainer, "fit", lambda _: seen.append((tiny.save_path / "result.json").exists())
    )

    train(tiny.settings(run={"max_steps": 2}), progress=SilentProgress())

    assert seen == [False]
    assert end_of(tiny)["exit_code"] == 0


def test_a_ctrl_c_that_a_launcher_repeats_is_one() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_a_second_ctrl_c_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        with StopSignals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SAME_PRESS_SECONDS + 0.1)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_a_signal_from_outside_the_tests_is_not_taken_for_one_of_theirs() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with StopSignals() as signals:
            subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert received == [signal.SIGTERM]
    assert signals.received == 0
