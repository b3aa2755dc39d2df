"""Prompts evaluated after each epoch: figures, the best epoch, early stopping, resuming."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core import evaluated_training
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.errors import DataError, MachineError, StoppedError
from speculators_cli.core.evaluation.evaluate import evaluate
from speculators_cli.core.progress import Progress
from speculators_cli.core.training import run
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.prompt_evaluation import EvaluateDraft
from speculators_cli.core.training.report import TrainReport
from speculators_cli.settings.evaluate import EvaluateSettings
from speculators_cli.settings.train import TrainSettings
from tests.chat_verifier import write_rows, write_word_verifier
from tests.recorded_progress import RecordedProgress
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs

NUM_PROMPTS, NUM_NEW_TOKENS = 5, 12
Train = Callable[..., TrainReport]


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny verifier, a tokenizer for it, and prompts."""
    folder = tmp_path_factory.mktemp("worded")
    write_word_verifier(folder / "verifier")
    texts = [" ".join(f"w{5 + (3 * i + k) % 30}" for k in range(3 + i)) for i in range(NUM_PROMPTS)]
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    return folder


@pytest.fixture
def train(tiny: TinyInputs, worded: Path) -> Train:
    """Trains with an evaluation on the prompts after each epoch, into a folder of this name."""

    def call(name: str = "run", *, progress: Any = None, **changes: Any) -> TrainReport:
        evaluation = {
            "evaluate_prompts": str(worded / "prompts.jsonl"),
            "evaluate_max_new_tokens": NUM_NEW_TOKENS,
        }
        sections: dict[str, dict[str, Any]] = {
            "draft": {"verifier_name_or_path": str(worded / "verifier")},
            "evaluation": evaluation | changes.pop("evaluation", {}),
            "run": {"save_path": tiny.folder / name} | changes.pop("run", {}),
        }
        settings = tiny.settings(**sections, **changes)
        return evaluated_training.train(settings, progress=progress or RecordedProgress())

    return call


def read_tensors(checkpoint: Path) -> list[bytes]:
    names = ("model.safetensors", "trainer/optimizer.safetensors")
    return [(checkpoint / name).read_bytes() for name in names]


def test_the_figure_of_an_epoch_is_that_of_evaluate_on_its_checkpoint(
    train: Train, tiny: TinyInputs, worded: Path
) -> None:
    report = train()

    lines = read_metrics(tiny.folder / "run", "val")
    assert len(lines) == 2
    for epoch, line in enumerate(lines):
        found = evaluate(
            EvaluateSettings.model_validate(
                {
                    "source": {"checkpoint": str(tiny.folder / f"run/{epoch}")},
                    "prompts": {"prompts": str(worded / "prompts.jsonl")},
                    "drafting": {"max_new_tokens": NUM_NEW_TOKENS},
                    "engine": {"device": "cpu"},
                }
            )
        ).measured
        assert line["evaluated_passes"] == found.num_passes > 0
        assert line["evaluated_acceptance_length"] == found.acceptance_length
        rates = [line[f"evaluated_acceptance_rate_{k}"] for k in range(found.num_draft_tokens)]
        assert rates == list(found.acceptance_rates)
    assert report.evaluated_acceptance_length == lines[-1]["evaluated_acceptance_length"]


def test_evaluating_changes_no_bit_of_the_training_nor_does_resuming_it(
    train: Train, tiny: TinyInputs
) -> None:
    none = {"evaluate_prompts": None, "evaluate_max_new_tokens": 128}  # the default
    plain = {"evaluation": none, "schedule": {"scheduler": "none"}}
    total_steps = train("plain", **plain).total_steps
    given = {"schedule": {"scheduler": "none"}}

    for cut in (total_steps // 2, total_steps // 2 + 1, None):
        report = train("cut", run={"max_steps": cut}, **given)
    train("whole", **given)

    assert report.is_resumed
    expected = read_tensors(tiny.folder / "plain/1")
    assert read_tensors(tiny.folder / "cut/1") == expected
    assert read_tensors(tiny.folder / "whole/1") == expected
    assert (
        read_metrics(tiny.folder / "cut", "val")[-1]["evaluated_acceptance_length"]
        == (read_metrics(tiny.folder / "whole", "val")[-1]["evaluated_acceptance_length"])
    )


@dataclass
class Accepting:
    """An evaluation whose epochs have these accepted tokens per pass."""

    counts: Iterator[Sequence[int]]
    drawn: list[float] = field(default_factory=list)
    is_opened: bool = False

    def __call__(
        self,
        settings: TrainSettings,  # noqa: ARG002
        inputs: Inputs,  # noqa: ARG002
        ranks: Ranks,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> EvaluateDraft:
        self.is_opened = True
        return self.evaluate

    def evaluate(self, _: TrainedDraft) -> Sequence[int]:
        self.drawn.append(torch.rand(()).item())
        return next(self.counts)


def accepting(counts: Sequence[Sequence[int]]) -> Accepting:
    return Accepting(iter(counts))


def test_random_numbers_of_an_evaluation_are_not_those_of_the_training(tiny: TinyInputs) -> None:
    evaluation = accepting([[1], [1]])

    run.train(tiny.settings(), open_evaluation=evaluation)

    assert len(evaluation.drawn) == 2
    assert evaluation.drawn[0] == evaluation.drawn[1]  # training itself draws none in an epoch


def test_the_best_epoch_is_that_of_the_prompts_where_the_loss_disagrees(tiny: TinyInputs) -> None:
    found = run.train(
        tiny.settings(run={"epochs": 3}), open_evaluation=accepting([[3, 2], [1, 0], [2, 1]])
    )

    losses = [line["loss"] for line in read_metrics(tiny.save_path, "val")]
    assert min(losses) < losses[0]
    assert found.best_epoch == 0
    assert found.best_evaluated_acceptance_length == 3.5
    assert found.evaluated_acceptance_length == 2.5
    assert (tiny.save_path / "checkpoint_best").readlink() == Path("0")


def test_training_stops_after_epochs_without_a_better_one_and_stays_stopped(
    tiny: TinyInputs,
) -> None:
    messages = RecordedProgress()

    def go_on(patience: int, counts: Sequence[Sequence[int]]) -> TrainReport:
        return run.train(
            tiny.settings(run={"epochs": 9, "early_stopping_patience": patience}),
            progress=messages,
            open_evaluation=accepting(counts),
        )

    # Equal to the best is not better, unless the simulated length or the loss is.
    stopped = go_on(2, [[1], [3], [2], [2], [9]])
    again = go_on(2, [])
    further = go_on(3, [[2], [9]])

    assert (stopped.is_stopped_early, stopped.best_epoch) == (True, 1)
    assert stopped.step < stopped.total_steps
    assert any("none of the last 2 was better than epoch 2" in x for x in messages.infos)
    assert (again.was_already_finished, again.is_stopped_early) == (True, True)
    assert (further.step / stopped.step, further.best_epoch) == (5 / 4, 1)
    assert not (tiny.save_path / "5").exists()


def test_without_prompts_patience_is_with_the_validation(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 3.0, 1.0, 1.5, 9.0])
    monkeypatch.setattr(
        "speculators_cli.core.training.trainer.Trainer.validate",
        lambda _: {"loss": next(losses), "acceptance_length": 1.0},
    )

    report = run.train(tiny.settings(run={"epochs": 9, "early_stopping_patience": 2}))

    assert report.is_stopped_early
    assert (report.best_epoch, report.best_validation_loss) == (2, 1.0)


def test_patience_without_anything_to_compare_is_refused(tiny: TinyInputs) -> None:
    settings = tiny.settings(run={"early_stopping_patience": 1}, data={"train_data_ratio": 1.0})

    with pytest.raises(DataError, match="needs validation samples"):
        run.train(settings)


def test_prompts_without_validation_are_enough(train: Train) -> None:
    report = train(data={"train_data_ratio": 1.0}, run={"early_stopping_patience": 5})

    assert report.validation_loss is None
    assert report.evaluated_acceptance_length is not None
    assert report.best_epoch is not None


def test_answers_that_end_at_once_are_warned_of_and_never_the_best(tiny: TinyInputs) -> None:
    messages = RecordedProgress()

    found = run.train(tiny.settings(), progress=messages, open_evaluation=accepting([[], []]))

    assert any("evaluation of epoch 1 has no metrics" in x for x in messages.warnings)
    assert (found.best_epoch, found.evaluated_acceptance_length) == (None, None)


def test_prompts_without_text_are_a_data_error_with_the_flag_of_train(
    train: Train, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [{"answer": "w5"}])

    with pytest.raises(DataError) as error:
        train(evaluation={"evaluate_prompts": str(file)})

    assert "--evaluate-prompts" in str(error.value.hint)


@pytest.mark.parametrize("place", ["load", "draft"])
def test_a_verifier_that_does_not_fit_beside_the_training_is_named(
    train: Train, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    module = "speculators_cli.core.evaluation"
    target = "verifier.load_model" if place == "load" else "repeated.draft_and_verify"
    monkeypatch.setattr(f"{module}.{target}", fail)

    with pytest.raises(MachineError, match=r"verifier `.*` needs") as error:
        train()

    assert "more memory than the training leaves" in error.value.message
    assert "--evaluate-prompts" in str(error.value.hint)


def test_a_finished_run_loads_no_verifier(tiny: TinyInputs) -> None:
    run.train(tiny.settings())
    evaluation = accepting([])

    report = run.train(tiny.settings(), open_evaluation=evaluation)

    assert report.was_already_finished
    assert not evaluation.is_opened


def test_a_signal_while_evaluating_saves_the_epoch_which_is_evaluated_on_resume(
    tiny: TinyInputs,
) -> None:
    class Stopping(Accepting):
        def evaluate(self, _: TrainedDraft) -> Sequence[int]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # interrupted at once
            raise AssertionError("it went on")

    with pytest.raises(StoppedError):
        run.train(tiny.settings(), open_evaluation=Stopping(iter([])))
    assert read_metrics(tiny.save_path, "val") == []

    report = run.train(tiny.settings(), open_evaluation=accepting([[1], [2]]))

    assert report.is_resumed
    lines = read_metrics(tiny.save_path, "val")
    assert [line["evaluated_acceptance_length"] for line in lines] == [2.0, 3.0]
