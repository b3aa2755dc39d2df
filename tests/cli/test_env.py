"""`speculators env` as the user types it."""

import json
import platform

import pytest
import torch

from speculators_cli import __version__
from speculators_cli.cli.app import run


def test_versions_are_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0

    versions = json.loads(capsys.readouterr().out)["versions"]
    assert versions["speculators-cli"] == __version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["sglang"] is None


def test_every_version_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env"]) == 0

    out, err = capsys.readouterr()
    assert f"torch            {torch.__version__}" in out
    assert err == ""
