"""Files of tensors: byte by byte those of the safetensors library, with their checksums."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.drafts.checkpoint_reader import hash_file
from speculators_cli.core.training import tensor_file
from speculators_cli.core.training.tensor_file import DTYPES, write_tensors
from tests.full_disk import no_file_over


def make_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each type and of odd shapes, in no order."""
    torch.manual_seed(0)
    tensors = {f"b.{dtype}": (torch.rand(3, 5) * 9).to(dtype) for dtype in sorted(DTYPES, key=str)}
    odd = {"z": torch.tensor(7.0), "empty": torch.zeros(0, 4), 'quoted "ü"': torch.rand(2)}
    return tensors | odd


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("block_bytes", [7, 2**24])
def test_the_bytes_are_those_of_the_library(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metadata: dict[str, str] | None,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", block_bytes)
    tensors = make_tensors()
    save_file(tensors, tmp_path / "expected", metadata)

    record = write_tensors(tensors, tmp_path / "file", metadata)

    assert (tmp_path / "file").read_bytes() == (tmp_path / "expected").read_bytes()
    assert record.num_bytes == (tmp_path / "file").stat().st_size
    assert record.sha256 == hash_file(tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["z"], tensors["z"])


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with no_file_over(500), pytest.raises(OSError, match="File too large"):
        write_tensors({"a": torch.zeros(1000)}, tmp_path / "file")


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(FileExistsError):
        write_tensors({"a": torch.zeros(3)}, tmp_path / "file")

    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_flushed_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    is_flushed = threading.Event()

    def flush(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        is_flushed.set()

    def blocks(*_: object) -> object:
        yield memoryview(b"first")
        assert is_flushed.wait(20)
        yield memoryview(b"second")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(tensor_file, "_blocks", blocks)

    write_tensors({"a": torch.zeros(3)}, tmp_path / "file")

    assert sizes[0] in (0, 5)
    assert sizes[-1] == 11


def test_an_error_of_the_disk_that_only_an_early_flush_is_told_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap: the system reports it once, and the flush at the end would succeed.
    was_told = threading.Event()

    def flush(_: int) -> None:
        if not was_told.is_set():
            was_told.set()
            raise OSError(5, "Input/output error")

    def blocks(*_: object) -> object:
        assert was_told.wait(20)
        yield memoryview(b"content")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(tensor_file, "_blocks", blocks)
    monkeypatch.setattr(tensor_file, "_hash", lambda *_: "")

    with pytest.raises(OSError, match="Input/output error"):
        write_tensors({"a": torch.zeros(3)}, tmp_path / "file")
