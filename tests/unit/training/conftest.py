"""A run that is trained once, and copied for each test that damages it."""

import shutil
from pathlib import Path

import pytest

from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from tests.tiny_run import TinyInputs


@pytest.fixture(scope="session")
def trained_once(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save path of a finished run of two epochs; nothing may be written into it."""
    save_path = tmp_path_factory.mktemp("trained") / "checkpoints"
    train(shared_inputs.settings(run={"save_path": save_path}), progress=SilentProgress())
    return save_path


@pytest.fixture
def trained(trained_once: Path, tiny: TinyInputs) -> TinyInputs:
    """The tiny inputs, with a finished run of two epochs in their save path."""
    shutil.copytree(trained_once, tiny.save_path, symlinks=True)
    return tiny
