"""Settings of one algorithm, given to another."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.base import Settings, changes_on_resume, write_settings
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.loading import load_settings
from speculators_cli.settings.train import TrainSettings

REQUIRED: dict[type[Settings], dict[str, Any]] = {
    TrainSettings: {"verifier_name_or_path": "some/verifier", "full_vocab": True},
    BenchSettings: {},
}


@pytest.fixture(autouse=True)
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()


def load(flags: Mapping[str, object]) -> TrainSettings:
    return load_settings(TrainSettings, {**REQUIRED[TrainSettings], **flags})


@pytest.mark.parametrize("settings_class", REQUIRED)
@pytest.mark.parametrize(
    ("algorithm", "flags", "line"),
    [
        (
            "peagle",
            {"block_size": 4},
            "`--block-size` is a setting of `dflash` or `dspark`, not of `peagle`",
        ),
        (
            "dflash",
            {"ttt_steps": 5, "markov_rank": 8},
            "`--markov-rank` is a setting of `dspark`, not of `dflash`; "
            "`--ttt-steps` is a setting of `eagle3` or `peagle`, not of `dflash`",
        ),
        (
            "dspark",
            {"train_head": False},
            "`--freeze-head` is a setting of `eagle3` or `peagle`, not of `dspark`",
        ),
        (None, {"down_sample_ratio": 0.5}, "`--down-sample-ratio` is a setting of `peagle`"),
    ],
)
def test_a_setting_of_another_algorithm_is_refused(
    settings_class: type[Settings], algorithm: str | None, flags: dict[str, Any], line: str
) -> None:
    chosen = {} if algorithm is None else {"algorithm": algorithm}

    with pytest.raises(SettingsError) as raised:
        load_settings(settings_class, REQUIRED[settings_class] | chosen | flags)

    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        ("dflash", {"block_size": 4, "mask_token_id": 3}),
        ("dspark", {"num_anchors": 7, "block_size": 4, "ttt_steps": 3}),  # the default
        ("peagle", {"num_anchors": 7, "ttt_steps": 9, "mask_token_id": 3}),
    ],
)
def test_a_setting_that_algorithms_share_is_taken(
    algorithm: str, flags: dict[str, object], tmp_path: Path
) -> None:
    own = load({"algorithm": algorithm, **flags})
    write_settings(own, tmp_path / "settings.json")

    # Those of a run have the defaults of all algorithms.
    assert load_settings(TrainSettings, {}, tmp_path / "settings.json") == own


def test_a_draft_to_start_from_has_its_algorithm_later() -> None:
    flags = {"from_checkpoint": "draft", "block_size": 4}

    assert load(flags).dflash.block_size == 4
    with pytest.raises(SettingsError, match="not of `eagle3`"):
        load(flags | {"algorithm": "eagle3"})


def test_sections_that_a_run_does_not_read_do_not_stop_its_resume(tmp_path: Path) -> None:
    settings = load({"algorithm": "peagle"})
    write_settings(settings, tmp_path / "settings.json")
    old = json.loads((tmp_path / "settings.json").read_text())
    old["dflash"]["block_size"] = 4
    old["peagle"]["down_sample_ratio"] = 0.5

    changes = changes_on_resume(old, settings, unread={"eagle3", "dflash", "dspark"})

    assert [change.name for change in changes] == ["--down-sample-ratio"]
