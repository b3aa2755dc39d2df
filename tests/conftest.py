"""A tiny run, ready to train; a terminal that writes no escape codes."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels; it is asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny import TinyInputs, write_inputs


@pytest.fixture(scope="session")
def shared_inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """Verifier, samples and maps, written once; nothing may be written into them."""
    return write_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(shared_inputs: TinyInputs, tmp_path: Path) -> TinyInputs:
    """The shared inputs, with a folder of one's own for what a run writes."""
    for name in ("verifier", "data", "d2t.npy", "t2d.npy"):
        (tmp_path / name).symlink_to(shared_inputs.folder / name)
    return TinyInputs(tmp_path)


@pytest.fixture
def data_dir(tiny: TinyInputs) -> Path:
    """The tiny samples in a folder that may be written into."""
    folder = tiny.folder / "copied"
    folder.mkdir()
    for file in tiny.data_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "120")
