"""A disk that fills while a command writes: exit code 5, folder and bytes, nothing left behind."""

from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from tests.full_disk import no_file_over
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]


def files_below(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, and the names of folders but for the one that is written."""
    found = (path for path in folder.rglob("*") if path != folder / "out")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in found}


def fill(command: list[object], num_bytes: int, out: Path, capsys: Capture) -> None:
    """Run a command on a full disk, then on one with room."""
    flags = [str(x) for x in command]
    before = files_below(out.parent)

    with no_file_over(num_bytes):
        code = run(flags)

    message = capsys.readouterr().err
    assert code == 5, message
    assert f"`{out}` cannot be written: File too large" in message
    assert " free)" in message
    assert files_below(out.parent) == before
    assert run(flags) == 0


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "out"
    folder.parent.mkdir()
    return folder


@pytest.fixture(scope="module")
def checkpoints(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_path = tmp_path_factory.mktemp("run") / "checkpoints"
    assert run(["train", *shared_inputs.flags(save_path=save_path, epochs=1)]) == 0
    return save_path


@pytest.mark.parametrize("num_bytes", [0, 100, 20_000])
def test_a_full_disk_ends_an_export(
    checkpoints: Path, target: Path, capsys: Capture, num_bytes: int
) -> None:
    fill(["export", checkpoints, "--output-dir", target], num_bytes, target, capsys)


@pytest.mark.parametrize("num_bytes", [0, 100, 200])
def test_a_full_disk_ends_a_vocabulary_map(
    shared_inputs: TinyInputs, target: Path, capsys: Capture, num_bytes: int
) -> None:
    target.mkdir()
    command = ["build-vocab-map", "--data-path", shared_inputs.data_dir, "--output-dir", target]
    command += ["--draft-vocab-size", 19, "--verifier-name-or-path", shared_inputs.verifier_dir]
    fill(command, num_bytes, target, capsys)
    assert {"d2t.npy", "t2d.npy"} <= {file.name for file in target.iterdir()}


@pytest.mark.parametrize("num_bytes", [0, 100, 3000])
def test_a_full_disk_ends_a_conversion(
    tmp_path: Path, target: Path, capsys: Capture, num_bytes: int
) -> None:
    for index in range(4):
        sample = {"input_ids": torch.arange(7), "loss_mask": torch.ones(7)}
        sample |= {"hidden_state": torch.randn(7, 768), "target": torch.randn(7, 256)}
        (tmp_path / "v0").mkdir(exist_ok=True)
        torch.save(sample, tmp_path / "v0" / f"data_{index}.pt")

    fill(["convert-v0", tmp_path / "v0", "--output-dir", target], num_bytes, target, capsys)

    assert len(list(target.glob("*.pt"))) == 4
