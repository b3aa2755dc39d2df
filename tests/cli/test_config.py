"""`--config` of every command that has settings."""

import json
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.cli.commands import COMMANDS
from speculators_cli.cli.flags import CONFIG
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
CONFIGURED = [name for name in COMMANDS if name != "env"]


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_key_that_is_no_setting_is_named_with_the_nearest(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    settings_class = COMMANDS[name].load().settings_class
    section, info = next(iter(settings_class.model_fields.items()))
    key = next(iter(info.annotation.model_fields))
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps({section: {f"{key}x": 1}}))

    code = run([name, "--config", str(file)])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert f"`{section}.{key}x` in `{file}` is not a setting" in err
    assert f"Did you mean `{section}.{key}`?" in err


def test_flags_win_over_the_file_and_the_file_over_defaults(
    tiny: TinyInputs, capsys: Capture
) -> None:
    file = tiny.folder / "inspect.toml"
    file.write_text(
        f'[inspect]\ndata_path = "{tiny.data_dir}"\ntotal_seq_len = 64\ntokens_per_second = 5.0\n'
    )

    run(["inspect-data", "--config", str(file), "--tokens-per-second", "7", "--json"])

    report = json.loads(capsys.readouterr().out)
    assert report["total_seq_len"] == 64
    assert report["tokens_per_second"] == 7


def test_a_positional_value_wins_over_the_file_too(tiny: TinyInputs, capsys: Capture) -> None:
    file = tiny.folder / "inspect.yaml"
    file.write_text("inspect: {data_path: gone, total_seq_len: 64}\n")

    run(["inspect-data", str(tiny.data_dir), "--config", str(file), "--json"])

    assert json.loads(capsys.readouterr().out)["num_samples"] == 24


@pytest.mark.parametrize("name", [name for name in CONFIGURED if name != "train"])
def test_the_file_of_another_command_is_refused_by_its_name(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[draft]\nverifier_name_or_path = "x"\n[eagle3]\nttt_steps = 5\n')

    code = run([name, "--config", str(file)])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert f"`{file}` holds settings of `speculators train`, not of `speculators {name}`" in err
    assert f"Run `speculators train --config {file}`" in err


def test_the_settings_of_a_demo_are_not_those_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "demo.toml"
    file.write_text('[run]\noutput_dir = "x"\n')

    code = run(["train", "--config", str(file), "--verifier-name-or-path", "x"])

    assert code == 2
    assert "holds settings of `speculators demo`" in capsys.readouterr().err


def test_a_command_without_settings_takes_no_file() -> None:
    assert CONFIG not in COMMANDS["env"].load().flags
