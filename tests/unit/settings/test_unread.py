"""Values that nothing would read are refused."""

from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.loading import load_settings
from speculators_cli.settings.train import TrainSettings

VERIFIER: dict[str, Any] = {"verifier_name_or_path": "some/verifier"}
DFLASH = {"algorithm": "dflash"}
DPACE = {"algorithm": "dflash", "block_loss": "ce", "block_loss_weights": "dpace"}
DSPARK = {"algorithm": "dspark"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize(
    ("without", "beside", "flags", "line"),
    [
        (
            {},
            {"evaluate_prompts": "prompts.jsonl"},
            {"evaluate_max_new_tokens": 5, "evaluate_max_prompts": 7},
            "`--evaluate-max-new-tokens`, `--evaluate-max-prompts` have no effect without "
            "`--evaluate-prompts`",
        ),
        (
            {"scheduler": "none"},
            {"scheduler": "cosine"},
            {"warmup_ratio": 0.2},
            "`--warmup-ratio` has no effect with `--scheduler none`",
        ),
        (
            {"val_data_path": ["data"]},
            {},
            {"train_data_ratio": 0.5},
            "`--train-data-ratio` has no effect with `--val-data-path`",
        ),
        (
            DFLASH,
            DPACE,
            {"dpace_alpha": 0.3},
            "`--dpace-alpha` has no effect without `--block-loss-weights dpace`",
        ),
        (
            DPACE,
            DFLASH,
            {"block_loss_gamma": 3.0},
            "`--block-loss-gamma` has no effect with `--block-loss-weights dpace`",
        ),
        (
            DSPARK | {"confidence_head": False},
            DSPARK,
            {"confidence_weight": 0.5},
            "`--confidence-weight` has no effect without `--confidence-head`",
        ),
    ],
)
def test_a_value_without_effect_is_refused(
    without: dict[str, Any], beside: dict[str, Any], flags: dict[str, Any], line: str
) -> None:
    given = VERIFIER | {"full_vocab": True} | flags

    with pytest.raises(SettingsError) as raised:
        load_settings(TrainSettings, given | without)

    assert str(raised.value).splitlines()[1:] == [f"  {line}"]
    load_settings(TrainSettings, given | beside)


def test_all_samples_train_where_others_validate() -> None:
    flags = VERIFIER | {"full_vocab": True, "val_data_path": ["data"], "train_data_ratio": 1.0}

    assert load_settings(TrainSettings, flags).data.train_data_ratio == 1.0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"disk_dir": "data"}, "`--disk-dir` has no effect without `--capture`"),
        (
            {"capture_compute_dtype": "float8"},
            "`--capture-compute-dtype` has no effect without `--capture`",
        ),
    ],
)
def test_a_bench_has_no_setting_of_a_capture_that_is_not_timed(
    flags: dict[str, Any], line: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(BenchSettings, flags)

    assert line in str(raised.value)
    load_settings(BenchSettings, {"capture": True} | flags)
