"""Settings files that cannot be read, and settings in them that cannot be used: what and why."""

import json
import os
from pathlib import Path

import pytest

from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.config_file import read_config
from speculators_cli.settings.loading import load_settings
from speculators_cli.settings.train import TrainSettings

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(30)
)
UNREADABLE: list[tuple[str, str, str]] = [
    ("run.yaml", "", "is empty (0 bytes)"),
    ("run.yaml", "- a\n- b\n", "holds no sections of settings"),
    ("run.yaml", "a: b: c", "is not YAML: mapping values are not allowed here in line 1, column 5"),
    ("run.yaml", "run: {seed: 1, seed: 2}", "is not YAML: `seed` is set twice"),
    ("run.yaml", "!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ("run.yaml", "run: !!timestamp x", "is not YAML: "),
    ("run.yaml", "run: !!bool x", "is not YAML: "),
    ("run.yaml", "run: !!int ''", "is not YAML: "),
    ("run.yaml", "run: {seed: 2024-13-45}", "is not YAML: month must be in 1..12"),
    ("run.yaml", "run: &a [*a]", "repeats its aliases too often"),
    ("run.yaml", BOMB, "repeats its aliases too often"),
    ("run.yaml", MERGES, "repeats its aliases too often"),
    ("run.yaml", "{a: " * 1000, "is nested too deeply"),
    ("run.toml", "[run]\nseed = 1\nseed = 2\n", "is not TOML: Cannot overwrite a value (at line 3"),
    ("run.toml", "a = " + "[" * 5000, "is nested too deeply"),
    ("run.json", '{"run": ', "is truncated: its JSON ends early"),
    ("run.json", "null", "holds no sections of settings"),
    ("run.json", '{"run": {"seed": 1, "seed": 2}}', "cannot be used: `seed` is set twice"),
    ("run.json", '{"run": {"seed": ' + "9" * 5000 + "}}", "cannot be used: Exceeds the limit"),
    ("run.txt", "run: 1", "must end in `.toml`, `.yaml`, `.yml` or `.json`"),
]


def load(file: Path) -> TrainSettings:
    return load_settings(TrainSettings, {}, file)


@pytest.mark.parametrize(("name", "text", "reason"), UNREADABLE)
def test_a_settings_file_that_cannot_be_read_says_why(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(SettingsError) as caught:
        read_config(tmp_path / name)

    assert "--config" in caught.value.message
    assert f"`{tmp_path / name}`" in caught.value.message
    assert reason in caught.value.message
    assert caught.value.hint is not None


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")

    with pytest.raises(SettingsError, match="is a FIFO"):
        read_config(tmp_path / "run.yaml")
    with pytest.raises(SettingsError, match="is a folder"):
        read_config(tmp_path)
    with pytest.raises(SettingsError, match="does not exist"):
        read_config(tmp_path / "nothing.toml")


def test_an_alias_that_is_written_out_a_few_times_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.YAML"
    file.write_bytes(b"\xef\xbb\xbfx: &x {seed: 5}\r\nrun: *x\r\nother:\r\n  <<: *x\r\n")

    assert read_config(file) == {"x": {"seed": 5}, "run": {"seed": 5}, "other": {"seed": 5}}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("foo: 1", "`foo` in `{file}` is not a setting", "Use the sections `draft`, `run`, `data`"),
        ("1: 2", "`1` in `{file}` is not a setting", "Use the sections `draft`, `run`, `data`"),
        ("lr: 1", "`lr` in `{file}` is not a setting", "Did you mean `optimizer.lr`?"),
        ("run: {lr: 1}", "`run.lr` in `{file}` is not a setting", "Did you mean `optimizer.lr`?"),
        (
            "run: 5",
            "`run` in `{file}` must be a section of settings, got `5`",
            "Write the settings below it, such as `run.save_path`",
        ),
    ],
)
def test_a_key_that_is_no_setting_comes_first_and_gets_the_hint(
    text: str, message: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)

    with pytest.raises(SettingsError) as caught:
        load(file)

    assert caught.value.message.splitlines()[1].strip() == message.format(file=file)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_the_file_of_another_program_is_described_in_a_few_lines(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({f"key{i}": "x" * 400 for i in range(500)}))

    with pytest.raises(SettingsError) as caught:
        load(file)

    lines = caught.value.message.splitlines()
    assert "`key0` in" in lines[1]
    assert len(lines) == 22
    assert lines[-1].endswith(" more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: x}", "`--seed` must be a whole number, got `x`"),
        ("run: {seed: 99999999999999999999}", "`--seed` must be below 2^63"),
        ("run: {run_name: 2024-01-01}", "`--run-name` must be text, got `2024-01-01`"),
        ("optimizer: {lr: [1]}", "`--lr` must be a number, got `[1]`"),
        ("run: {resume_from_checkpoint: 7}", "must be `true` or `false`"),
        ("data: {data_path: 5}", "`--data-path` must be a list, got `5`"),
        ("data: {data_path: ''}", "`--data-path` must not be empty"),
        ("data: {data_path: ['.', '']}", "`--data-path` must not be empty"),
        ("run: {save_path: ''}", "`--save-path` must not be empty"),
        ("draft: {verifier_name_or_path: ''}", "`--verifier-name-or-path` must not be empty"),
    ],
)
def test_a_value_that_cannot_be_used_is_explained_by_its_flag(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)

    with pytest.raises(SettingsError) as caught:
        load(file)

    assert message in caught.value.message


@pytest.mark.parametrize("name", ["run.yaml", "run.json", "run.toml"])
def test_one_folder_may_be_written_without_a_list(name: str, tmp_path: Path) -> None:
    content = {
        "draft": {"verifier_name_or_path": "some/verifier", "full_vocab": True},
        "data": {"data_path": str(tmp_path)},
    }
    toml = (
        '[draft]\nverifier_name_or_path = "some/verifier"\nfull_vocab = true\n'
        f'[data]\ndata_path = "{tmp_path}"\n'
    )
    # JSON is YAML.
    (tmp_path / name).write_text(toml if name == "run.toml" else json.dumps(content))

    assert load(tmp_path / name).data.data_path == (tmp_path,)
