"""A launcher that starts a run again: with `--no-resume-from-checkpoint` it resumes itself."""

import pytest

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.core.training.trainer import Trainer
from tests.tiny_run import TinyInputs

STEPS_PER_EPOCH = 9


def start_over(tiny: TinyInputs, *, epochs: int = 2) -> TrainReport:
    run = {"resume_from_checkpoint": False, "epochs": epochs}
    return train(tiny.settings(run=run), progress=SilentProgress())


def crash(tiny: TinyInputs, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a new run that ends with a bug at a step."""
    real = Trainer.train_step

    def fail(trainer: Trainer, *arguments: object, **options: object) -> None:
        if trainer.state.step == step:
            raise ZeroDivisionError("a bug")
        real(trainer, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(ZeroDivisionError):
            start_over(tiny)


@pytest.mark.parametrize(("step", "is_saved"), [(3, False), (10, True)])
def test_a_restarted_run_resumes_itself_and_never_the_old_one(
    trained: TinyInputs, monkeypatch: pytest.MonkeyPatch, step: int, is_saved: bool
) -> None:
    old = find_checkpoints(trained.save_path)[-1].state.run_id
    crash(trained, step, monkeypatch)
    latest = find_checkpoints(trained.save_path)[-1].state
    assert (latest.run_id != old) == is_saved

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    report = start_over(trained)

    assert report.is_resumed == is_saved
    assert report.step == 2 * STEPS_PER_EPOCH
    runs = {c.state.run_id for c in find_checkpoints(trained.save_path)}
    assert len(runs) == 1
    assert old not in runs
    if is_saved:
        assert runs == {latest.run_id}


def test_a_run_that_is_started_again_by_hand_starts_over(
    trained: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(trained, 10, monkeypatch)
    first = find_checkpoints(trained.save_path)[-1].state.run_id

    report = start_over(trained)

    assert not report.is_resumed
    assert find_checkpoints(trained.save_path)[-1].state.run_id != first
