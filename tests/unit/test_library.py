"""The names of the package itself."""

import ast
import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import speculators_cli
from speculators_cli import (
    SettingsError,
    TrainReport,
    TrainSettings,
    load_settings,
    train,
)
from tests.recorded_progress import RecordedProgress
from tests.tiny_run import TinyInputs

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "library.md"


def test_every_name_is_there() -> None:
    assert len(speculators_cli.__all__) > 30
    for name in speculators_cli.__all__:
        assert getattr(speculators_cli, name).__name__ == name
    assert sorted(speculators_cli._MODULES) == sorted(speculators_cli.__all__)
    assert set(speculators_cli.__all__) < set(dir(speculators_cli))


def test_a_type_checker_sees_the_same_names_in_the_same_modules() -> None:
    tree = ast.parse(Path(speculators_cli.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))

    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert seen == speculators_cli._MODULES


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        operator.attrgetter("trian")(speculators_cli)


def test_settings_and_errors_import_no_torch() -> None:
    script = (
        "import json, sys; from speculators_cli import SpeculatorsError, TrainSettings, "
        "load_settings; print(json.dumps(sorted(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    modules = set(json.loads(done.stdout))
    assert {"torch", "transformers", "numpy", "typer", "rich"} & modules == set()
    assert "pydantic" in modules


def test_a_run_is_followed_through_progress(tiny: TinyInputs) -> None:
    settings: TrainSettings = tiny.settings(run={"epochs": 1, "max_steps": 2})
    recorder = RecordedProgress()

    report: TrainReport = train(settings, progress=recorder)

    assert [step.step for step in recorder.steps] == [1, 2]
    assert report.step == 2


def test_settings_that_cannot_be_used_are_an_error_of_the_library() -> None:
    with pytest.raises(SettingsError, match=r"`--epochs` must be greater than or equal to 1") as e:
        load_settings(TrainSettings, {"verifier_name_or_path": "x", "epochs": 0})

    assert e.value.exit_code == 2


def test_the_example_of_the_page_runs_as_it_stands(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tiny.folder)

    exec(compile(example, str(PAGE), "exec"), {})  # noqa: S102

    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("24 samples, 548 tokens, ")
    assert lines[-1] == "eagle3 19"
    assert (tiny.folder / "served" / "config.json").exists()
    assert err == ""


def test_the_page_lists_every_name() -> None:
    text = PAGE.read_text("utf-8")

    assert [name for name in speculators_cli.__all__ if f"`{name}" not in text] == [
        "FrozenVerifier"
    ]
