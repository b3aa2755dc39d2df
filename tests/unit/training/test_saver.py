"""Checkpoints that are written while training goes on."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from speculators_cli.core.drafts.checkpoint_reader import BEST_LINK, find_checkpoints
from speculators_cli.core.errors import DivergedError, MachineError, StoppedError
from speculators_cli.core.progress import StepReport
from speculators_cli.core.training import saver
from speculators_cli.core.training.host_copy import HostCopy
from speculators_cli.core.training.run import train
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.saver import Saver
from speculators_cli.core.training.snapshot import Snapshot
from speculators_cli.core.training.trainer import Trainer
from speculators_cli.settings.train import TrainSettings
from tests.full_disk import no_file_over
from tests.recorded_progress import RecordedProgress
from tests.tiny_run import TinyInputs

WEIGHTS = ("model.safetensors", "trainer/optimizer.safetensors")
PATIENCE = 20.0  # seconds


def every(tiny: TinyInputs, steps: int, **run: object) -> TrainSettings:
    """Settings of a run of one epoch of nine steps, with a checkpoint every few."""
    return tiny.settings(run={"epochs": 1, **run}, checkpoints={"checkpoint_every_steps": steps})


def slow_down(monkeypatch: pytest.MonkeyPatch, wait: Callable[[str], object]) -> None:
    """Call a function with the name of each checkpoint, in the thread that is about to write it."""
    write = saver.write

    def slow(folder: RunFolder, snapshot: Snapshot, *, keep: int | None) -> float:
        wait(snapshot.name)
        return write(folder, snapshot, keep=keep)

    monkeypatch.setattr(saver, "write", slow)


class Reached(RecordedProgress):
    """Lets a thread wait for a step of the training."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.is_reached = threading.Event()

    def trained(self, report: StepReport) -> None:
        super().trained(report)
        if report.step == self.step:
            self.is_reached.set()


def test_steps_go_on_while_a_checkpoint_is_written_and_are_not_in_it(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = every(tiny, 3, save_path=tiny.folder / "plain")
    with monkeypatch.context() as patch:
        save = Saver.save
        patch.setattr(Saver, "save", lambda self, *args: (save(self, *args), self.wait()))
        train(plain)
    progress = Reached(step=5)
    slow_down(
        monkeypatch,
        lambda name: name != "step-3" or progress.is_reached.wait(PATIENCE) or pytest.fail("stuck"),
    )

    report = train(every(tiny, 3), progress=progress)

    assert progress.is_reached.is_set()
    assert report.step == 9
    found = {c.folder.name: c for c in find_checkpoints(tiny.save_path)}
    assert [(name, c.state.step) for name, c in found.items()] == [
        ("step-3", 3),
        ("step-6", 6),
        ("0", 9),
    ]
    for name, checkpoint in found.items():
        checkpoint.verify()
        for file in WEIGHTS:
            expected = (plain.run.save_path / name / file).read_bytes()
            assert (checkpoint.folder / file).read_bytes() == expected


def test_one_checkpoint_is_written_at_a_time_and_the_log_says_how_long(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.6  # that a write takes; a step takes some milliseconds
    slow_down(monkeypatch, lambda _: time.sleep(seconds))
    progress = RecordedProgress()

    report = train(every(tiny, 1, max_steps=3), progress=progress)

    lines = [line for line in progress.infos if line.startswith("Saved ")]
    waited = [float(line.partition("waited ")[2].partition(" s")[0]) for line in lines]
    assert [line.split("`")[1] for line in lines] == ["step-1", "step-2", "step-3"]
    # The first finds nothing being written; the others wait for the one before.
    assert waited[0] < seconds / 2 < min(waited[1:])
    assert 3 * seconds / 2 < report.save_wait_seconds < report.duration_seconds
    assert len(find_checkpoints(tiny.save_path)) == 3


def test_an_error_of_a_write_ends_the_run_at_the_next_step(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(every(tiny, 3, max_steps=3))
    is_over = threading.Event()
    write, check = saver.write, Saver.check

    def fail(folder: RunFolder, snapshot: Snapshot, *, keep: int | None) -> float:
        try:
            with no_file_over(20_000):
                return write(folder, snapshot, keep=keep)
        finally:
            is_over.set()

    def check_later(self: Saver) -> None:
        # Only then is it certain that the step found the error, not the save after it.
        assert self._pending is None or is_over.wait(PATIENCE)
        time.sleep(0.05)
        check(self)

    monkeypatch.setattr(saver, "write", fail)
    monkeypatch.setattr(Saver, "check", check_later)
    progress = RecordedProgress()

    with pytest.raises(
        MachineError, match=r"`.*step-6` cannot be written: File too large"
    ) as error:
        train(every(tiny, 3), progress=progress)

    assert error.value.exit_code == 5
    assert [step.step for step in progress.steps] == [4, 5, 6, 7]
    assert [c.folder.name for c in find_checkpoints(tiny.save_path)] == ["step-3"]
    assert not list(tiny.save_path.glob(".*"))


def test_a_signal_during_a_write_waits_for_it_and_loses_no_step(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Reached(step=5)

    def stop(name: str) -> None:
        if name == "step-4":
            assert progress.is_reached.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    slow_down(monkeypatch, stop)

    with pytest.raises(StoppedError) as stopped:
        train(every(tiny, 4), progress=progress)

    last = progress.steps[-1].step
    assert last < 8
    assert f"saved as `step-{last}`" in stopped.value.message
    found = find_checkpoints(tiny.save_path)
    assert [c.state.step for c in found] == [4, last]
    assert [c.find_damage() for c in found] == [None, None]


@pytest.mark.parametrize("is_full", [False, True])
def test_an_error_of_a_step_lets_the_write_finish_and_is_not_hidden_by_it(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    has_failed = threading.Event()
    step = Trainer.train_step

    def fail_later(self: Trainer, *args: object) -> None:
        if self.state.step == 4:
            has_failed.set()
            raise DivergedError("diverged", hint="")
        step(self, *args)  # type: ignore[arg-type]

    def wait(_: str) -> None:
        assert has_failed.wait(PATIENCE)
        if is_full:
            raise MachineError("The disk is full", hint="Free space")

    monkeypatch.setattr(Trainer, "train_step", fail_later)
    slow_down(monkeypatch, wait)
    progress = RecordedProgress()

    with pytest.raises(DivergedError, match="diverged"):
        train(every(tiny, 3), progress=progress)

    found = [c.folder.name for c in find_checkpoints(tiny.save_path)]
    assert found == ([] if is_full else ["step-3"])
    assert ("The disk is full" in progress.warnings) == is_full


def test_the_best_link_and_old_checkpoints_follow_the_rename(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, tuple[list[str], str]] = {}

    def look(name: str) -> None:
        found = [c.folder.name for c in find_checkpoints(tiny.save_path)]
        link = tiny.save_path / BEST_LINK
        before[name] = (found, str(link.readlink()) if link.is_symlink() else "")

    slow_down(monkeypatch, look)

    settings = tiny.settings(run={"epochs": 3}, checkpoints={"keep_checkpoints": 1})
    train(settings)

    # Nothing of a checkpoint is seen before it is written, and nothing goes before that.
    assert before["0"] == ([], "")
    assert before["1"] == (["0"], "0")
    assert before["2"][0][-1] == "1"
    assert (tiny.save_path / BEST_LINK).resolve().is_dir()


def test_host_memory_is_used_again() -> None:
    host = HostCopy()
    source = {"a": torch.rand(3, 4), "b": torch.rand(2).bfloat16()}

    host.reserve(source.items())
    first = host.copy(source.items())
    expected = {name: tensor.clone() for name, tensor in source.items()}
    places = [tensor.data_ptr() for tensor in first.values()]
    for tensor in source.values():
        tensor.zero_()

    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    second = host.copy(source.items())
    assert [tensor.data_ptr() for tensor in second.values()] == places
    assert all(not tensor.any() for tensor in second.values())


def test_too_little_host_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    tensor = torch.zeros(2**20)
    monkeypatch.setattr(torch, "empty", refuse)

    with pytest.raises(MachineError, match=r"the copy of a checkpoint needs another 4\.0 MiB"):
        HostCopy().copy([("a", tensor)])
