"""Paths and lists in settings: what is meant is read, else a hint fixes the cause."""

import json
from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.settings.base import changes_on_resume
from speculators_cli.settings.loading import load_settings
from speculators_cli.settings.train import TrainSettings
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]


def load(tmp_path: Path, **flags: object) -> TrainSettings:
    needed = {"verifier_name_or_path": "verifier", "full_vocab": True, "data_path": [str(tmp_path)]}
    return load_settings(TrainSettings, needed | flags, None)


@pytest.mark.parametrize("value", ["3,17,30", "3, 17, 30", "3 17 30", "[3, 17, 30]", [3, 17, 30]])
def test_layer_ids_are_read_as_people_write_them(tmp_path: Path, value: object) -> None:
    assert load(tmp_path, target_layer_ids=value).draft.target_layer_ids == (3, 17, 30)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "run.yaml").write_text(
        "draft: {verifier_name_or_path: ~/llama, full_vocab: true}\n"
        "data: {data_path: ~/data, val_data_path: [~/data]}\n"
        "run: {save_path: ~/run, log_dir: logs~}\n"
    )

    settings = load_settings(TrainSettings, {}, tmp_path / "run.yaml")

    assert settings.data.data_path == settings.data.val_data_path == (tmp_path / "data",)
    assert settings.draft.verifier_name_or_path == str(tmp_path / "llama")
    assert settings.run.save_path == tmp_path / "run"
    assert settings.run.log_dir == Path("logs~")


TRAIN = ["train", "--verifier-name-or-path", "verifier", "--data-path"]
COUNT = ["build-vocab-map", "--target-vocab-size", "37", "--draft-vocab-size", "19"]


@pytest.mark.parametrize(
    ("command", "code", "message", "hint"),
    [
        ([*TRAIN, "file"], 2, "`--data-path`: `file` is not a folder", "Pass its folder, `.`"),
        ([*TRAIN, "none/below"], 2, "`none/below` does not exist", "Correct the path: of it, only"),
        ([*TRAIN, "empty"], 3, "`empty` holds no samples", "capture samples into it: it has no"),
        ([*TRAIN, "other"], 3, "`other` holds no samples", "such as `notes.txt`, and no `.pt`"),
        (
            [*TRAIN, "data", "--d2t-path", "empty"],
            *(2, "`--d2t-path`: `empty` is a folder", "Pass the file in it, such as `empty/d2t"),
        ),
        (
            [*TRAIN, "data", "--target-layer-ids", "3;5"],
            *(2, "`--target-layer-ids` must be whole numbers such as `3,17,30`, got `3;5`", ""),
        ),
        ([*TRAIN, "data", "--target-layer-ids", ""], 2, "must be whole numbers such as", ""),
        (["inspect-data", "empty"], 3, "`empty` holds no samples", "capture samples into it"),
        (["inspect-data", "other"], 3, "`other` holds no samples", "such as `notes.txt`"),
        (
            ["inspect-data", "data", "--html", "empty"],
            *(2, "`--html`: `empty` is a folder", "Pass a file in it, such as `empty/report.html`"),
        ),
        (
            ["convert-v0", "empty", "--output-dir", "v1"],
            *(3, "`empty` holds no samples", "capture samples into it"),
        ),
        (
            ["convert-v0", "data", "--output-dir", "v1"],
            *(3, "is a v1 sample, read as v0", "`speculators train` reads other formats directly"),
        ),
        (
            [*COUNT, "--token-freq-path", "empty"],
            *(2, "`--token-freq-path`: `empty` is a folder", "such as `empty/token_freq.pt`"),
        ),
        (
            [*COUNT, "--token-freq-path", "no.pt"],
            2,
            "`--token-freq-path`: `no.pt` does not",
            "Corr",
        ),
        (
            [*COUNT, "--token-freq-path", "zero.pt"],
            *(2, "`--token-freq-path`: every count is zero", "Pass `--data-path` with samples"),
        ),
    ],
)
def test_a_hint_fixes_the_cause(
    tiny: TinyInputs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    command: list[str],
    code: int,
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tiny.folder)
    Path("file").touch()
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    torch.save({1: 0, 5: 0}, "zero.pt")

    assert run(command) == code

    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert hint in err.rpartition("hint: ")[2]
    assert not Path("v1").exists()


def test_where_no_data_path_is_given_the_flags_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(COUNT) == 2

    err = " ".join(capsys.readouterr().err.split())
    assert "`--data-path`: `data` does not exist" in err
    assert "hint: Pass `--data-path` or `--token-freq-path`" in err


def test_a_verifier_folder_is_stored_so_that_any_folder_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/verifier").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    local = load(tmp_path, verifier_name_or_path="models/verifier")
    hub = load(tmp_path, verifier_name_or_path="models/of-the-hub")

    assert local.draft.verifier_name_or_path == str(tmp_path / "models/verifier")
    assert hub.draft.verifier_name_or_path == "models/of-the-hub"


def test_a_folder_under_another_path_is_no_change_of_the_verifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verifier").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = load(tmp_path)
    old = settings.model_dump(mode="json")
    old["draft"]["verifier_name_or_path"] = "./verifier"

    assert settings.draft.verifier_name_or_path == str(tmp_path / "verifier")
    assert changes_on_resume(old, settings) == []
    old["draft"]["verifier_name_or_path"] = "of/the-hub"
    assert [change.name for change in changes_on_resume(old, settings)] == [
        "--verifier-name-or-path"
    ]


def test_a_verifier_folder_that_is_gone_is_not_looked_up_on_the_hub(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tiny.folder)
    config = {"draft": {"verifier_name_or_path": str(tiny.folder / "gone")}}
    Path("run.json").write_text(json.dumps(config), "utf-8")

    flags = tiny.flags(verifier_name_or_path=None, config="run.json")

    assert run(["train", *flags]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"the folder `{tiny.folder / 'gone'}` does not exist" in err
