"""Help, and the examples in it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from speculators_cli.cli import help as help_texts
from speculators_cli.cli import options
from speculators_cli.cli.app import run
from speculators_cli.cli.commands import COMMANDS
from speculators_cli.settings.base import Settings
from speculators_cli.settings.loading import load_settings

Capture = pytest.CaptureFixture[str]
EXAMPLES = [example for command in COMMANDS.values() for example in command.load().examples]


def help_of(argv: list[str], capture: Capture) -> str:
    code = run([*argv, "--help"])
    out, err = capture.readouterr()
    assert (code, err) == (0, "")
    return out


def test_help_lists_every_command(capsys: Capture) -> None:
    text = help_of([], capsys)

    for command in COMMANDS.values():
        assert f"{command.name} " in text
        assert command.summary in text


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_of_a_command_is_cut_in_a_narrow_window(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    text = help_of([name], capsys)

    panels, examples = text.split("Examples\n")
    flags = COMMANDS[name].load().flags
    assert len(flags) >= 4
    for flag in flags:
        for shown in (*flag.names, *flag.off_names, flag.metavar or ""):
            assert shown in panels
    assert "…" not in panels
    assert max(map(len, panels.splitlines())) == 80
    assert examples.strip().splitlines()[0].startswith(f"speculators {name}")


def test_in_a_very_narrow_window_the_text_stands_below_the_flag(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "36")

    text = help_of(["demo"], capsys)

    lines = [line.strip("│ ") for line in text.splitlines()]
    at = lines.index("--output-dir <path>")
    assert lines[at + 1 : at + 3] == ["Folder for samples, maps and", "checkpoints (default:"]


def test_choices_and_lists_stand_in_place_of_the_kind(capsys: Capture) -> None:
    text = help_of(["train"], capsys)

    for shown in (
        "--draft-arch <llama|qwen3>",
        "--data-format-version <0|1>",
        "--scheduler <linear|cosine|none>",
        "--logger <trackio|wandb|tensorboard,...>",
        "--target-layer-ids <int,int,...>",
    ):
        assert shown in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_two_or_three_examples(name: str) -> None:
    examples = COMMANDS[name].load().examples

    assert 2 <= len(examples) <= 3
    assert all(example.split()[:2] == ["speculators", name] for example in examples)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_settings_of_an_example_can_be_used(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for folder in ("data", "v0_data"):
        (tmp_path / folder).mkdir()
    for file in ("d2t.npy", "t2d.npy", "token_freq.pt"):
        (tmp_path / file).touch()
    (tmp_path / "run.toml").write_text('[draft]\nverifier_name_or_path = "x"\n')
    monkeypatch.chdir(tmp_path)
    loaded: list[Settings] = []

    def load(_: str, settings_class: type[Settings], *given: Any) -> Settings:
        loaded.append(load_settings(settings_class, *given))
        raise typer.Exit

    monkeypatch.setattr(options, "load", load)

    code = run(shlex.split(example)[1:])

    assert (code, capsys.readouterr().err) == (0, "")
    assert len(loaded) == 1


def test_the_examples_of_the_program_are_command_lines() -> None:
    for example in help_texts.EXAMPLES:
        program, name, *_ = shlex.split(example)
        assert program == "speculators"
        assert name in COMMANDS


def test_without_a_command_help_goes_to_stderr(capsys: Capture) -> None:
    code = run([])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Usage: speculators" in err


@pytest.mark.parametrize(
    ("argv", "heavy"),
    [(["--help"], {"pydantic"}), (["train", "--help"], set()), (["--version"], {"pydantic"})],
)
def test_help_imports_nothing_that_only_work_needs(argv: list[str], heavy: set[str]) -> None:
    heavy = heavy | {"torch", "transformers", "numpy", "yaml", "huggingface_hub", "safetensors"}
    heavy |= {"rich.markdown", "pygments", "asyncio"}
    script = (
        "import json, sys; from speculators_cli.cli.app import run; code = run(sys.argv[1:]); "
        "print(json.dumps([code, sorted(sys.modules)]))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, *argv], check=True, capture_output=True, text=True
    )

    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert heavy & set(modules) == set()
    assert "typer" in modules
