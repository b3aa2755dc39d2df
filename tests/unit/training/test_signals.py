"""A stop signal: the step is finished, the state saved, no step lost."""

import os
import signal
import time

import pytest
import torch

from speculators_cli.core.errors import StoppedError
from speculators_cli.core.models.checkpoint import find_checkpoints
from speculators_cli.core.progress import SilentProgress, StepReport
from speculators_cli.core.training.run import train
from speculators_cli.core.training.signals import SAME_PRESS_SECONDS, STOP_SIGNALS, StopSignals
from tests.tiny import TinyInputs


class Signaller(SilentProgress):
    """Sends a signal to this process once a step is told of."""

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step

    def trained(self, report: StepReport) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_run_goes_on_as_if_there_was_none(
    tiny: TinyInputs, number: signal.Signals
) -> None:
    whole = tiny.settings(run={"save_path": tiny.folder / "whole"})
    train(whole, progress=SilentProgress())

    with pytest.raises(StoppedError) as stopped:
        train(tiny.settings(), progress=Signaller(number, step=3))
    saved = find_checkpoints(tiny.save_path)
    train(tiny.settings(), progress=SilentProgress())

    assert stopped.value.exit_code == 128 + number
    assert [(c.folder.name, c.state["step"]) for c in saved] == [("step-3", 3)]
    ends = [find_checkpoints(path)[-1] for path in (tiny.save_path, tiny.folder / "whole")]
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


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM

    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_ctrl_c_that_a_launcher_repeats_is_one() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_a_second_ctrl_c_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SAME_PRESS_SECONDS + 0.1)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT
