"""Samples without a token to predict: refused before anything starts, or counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.cli.app import run
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs, split_samples

Capture = pytest.CaptureFixture[str]
TOTAL_SEQ_LEN = 32


def unsupervised(mask: Tensor) -> None:
    mask.zero_()


def only_the_first(mask: Tensor) -> None:
    mask.zero_()[0] = 1


def only_beyond(mask: Tensor) -> None:
    mask.zero_()[TOTAL_SEQ_LEN + 1 :] = 1


def last_within(mask: Tensor) -> None:
    mask.zero_()[TOTAL_SEQ_LEN] = 1


def edit_masks(folder: Path, edit: Callable[[Tensor], None], *, names: str = "*.pt") -> Path:
    """Change the masks of samples, which are made 40 tokens long."""
    for file in sorted(folder.glob(names)):
        content = torch.load(file, weights_only=True)
        repeats = -(-40 // len(content["input_ids"]))

        def long(x: Tensor, repeats: int = repeats) -> Tensor:
            return torch.cat([x] * repeats)[:40].clone()

        content["input_ids"], content["loss_mask"] = map(
            long, (content["input_ids"], content["loss_mask"])
        )
        content["hidden_states"] = [long(x) for x in content["hidden_states"]]
        edit(content["loss_mask"])
        torch.save(content, file)
    return folder


def train(tiny: TinyInputs, capsys: Capture, *more: str, **flags: object) -> tuple[int, str]:
    values = {"total_seq_len": TOTAL_SEQ_LEN, "epochs": 1, "max_steps": 2} | flags
    code = run(["train", *tiny.flags(**values), *more])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("edit", "message", "hint"),
    [
        (unsupervised, "has a supervised token after its first", "Set `loss_mask` to 1"),
        (only_the_first, "has a supervised token after its first", "Set `loss_mask` to 1"),
        (only_beyond, "begins after 33 tokens", "Pass `--total-seq-len 39`"),
    ],
)
@pytest.mark.parametrize("mode", [None, "--dry-run", "--plan"])
def test_samples_without_a_target_are_refused_before_anything_is_written(
    data_dir: Path,
    tiny: TinyInputs,
    capsys: Capture,
    edit: Callable[[Tensor], None],
    message: str,
    hint: str,
    mode: str | None,
) -> None:
    edit_masks(data_dir, edit)

    code, err = train(tiny, capsys, *([mode] if mode else []), data_path=data_dir)

    assert code == 3
    assert message in err
    assert hint in err
    assert not tiny.save_path.exists()


def test_the_hint_makes_the_run_possible(data_dir: Path, tiny: TinyInputs, capsys: Capture) -> None:
    edit_masks(data_dir, only_beyond)

    code, err = train(tiny, capsys, data_path=data_dir, total_seq_len=39)

    assert code == 0
    assert "supervised tokens" not in err


def test_the_last_token_of_a_packed_sequence_is_a_target(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edit_masks(data_dir, last_within)

    code, _ = train(tiny, capsys, data_path=data_dir)

    lines = read_metrics(tiny.save_path)
    assert code == 0
    assert lines[0]["loss"] > 0.1


def test_samples_that_lose_all_their_targets_are_counted(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edit_masks(data_dir, only_beyond, names="data_1?.pt")
    edit_masks(data_dir, unsupervised, names="data_2?.pt")

    code, err = train(tiny, capsys, data_path=data_dir, train_data_ratio=1.0)

    assert code == 0
    assert "4 of 24 samples have no supervised token" in err
    assert "10 of 24 samples have all supervised tokens truncated" in err


def test_what_an_index_knows_of_targets_is_what_a_scan_finds(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edit_masks(data_dir, only_beyond, names="data_1?.pt")
    flags = {"data_path": data_dir, "train_data_ratio": 1.0, "epochs": 2, "max_steps": None}
    train(tiny, capsys, **flags)

    code, err = train(tiny, capsys, **flags | {"epochs": 3})

    assert code == 0
    assert "10 of 24 samples have all supervised tokens truncated" in err


@pytest.mark.parametrize("edit", [unsupervised, only_beyond])
def test_validation_samples_without_a_target_validate_nothing(
    data_dir: Path, tiny: TinyInputs, capsys: Capture, edit: Callable[[Tensor], None]
) -> None:
    validation_dir = split_samples(data_dir, tiny.folder / "validation", num_samples=5)
    edit_masks(validation_dir, edit)

    code, err = train(
        *(tiny, capsys, "--json"),
        data_path=data_dir,
        val_data_path=validation_dir,
        max_steps=None,
    )

    assert code == 0
    assert "None of the 5 validation samples has a supervised token" in err
    lines = read_metrics(tiny.save_path)
    assert {line["split"] for line in lines} == {"train"}
    result: dict[str, Any] = json.loads((tiny.save_path / "result.json").read_text())
    assert result["validation_loss"] is None
    assert result["best_validation_loss"] is None


def test_inspection_names_samples_whose_answers_are_cut(data_dir: Path, capsys: Capture) -> None:
    edit_masks(data_dir, only_beyond, names="data_7.pt")

    code = run(["inspect-data", str(data_dir), "--total-seq-len", str(TOTAL_SEQ_LEN), "--json"])

    problems = json.loads(capsys.readouterr().out)["problems"]
    assert code == 1
    assert [(Path(p["file"]).name, p["problem"]) for p in problems] == [
        (
            "data_7.pt",
            "has its first supervised token after 33 others, beyond the 32 of `--total-seq-len`",
        )
    ]


def test_speed_is_not_measured_on_samples_without_a_target(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edit_masks(data_dir, unsupervised)
    verifier = ["--verifier-name-or-path", str(tiny.verifier_dir), "--draft-vocab-size", "19"]
    flags = ["--total-seq-len", "64", "--steps", "2", "--warmup-steps", "1", "--device", "cpu"]

    code = run(["bench", "--data-path", str(data_dir), *verifier, *flags, "--no-profile"])

    assert code == 3
    assert "has a supervised token after its first" in " ".join(capsys.readouterr().err.split())
