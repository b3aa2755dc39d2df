"""A disk that fills: a named error, nothing left behind, what was there before as it was.

A limit on the size of files stands for a full disk: the system then refuses a write in its middle,
whoever makes it, Python or a library.
"""

import json
from pathlib import Path

import pytest

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import (
    check_free_space,
    format_bytes,
    locking,
    replacing,
    write_json,
)
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.core.training.run_folder import RunFolder
from tests.full_disk import no_file_over
from tests.tiny_run import TinyInputs


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/optimizer.safetensors"])
def test_a_disk_that_fills_during_a_save_keeps_what_was_there(
    trained: TinyInputs, name: str
) -> None:
    num_bytes = (trained.save_path / "1" / name).stat().st_size - 100
    before = names(trained.save_path)

    with no_file_over(num_bytes), pytest.raises(MachineError) as error:
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())

    assert f"`{trained.save_path / '2'}` cannot be written: File too large" in error.value.message
    assert " needed, " in error.value.message
    assert " free)" in error.value.message
    assert names(trained.save_path) == before
    assert [c.find_damage() for c in find_checkpoints(trained.save_path)] == [None, None]
    result = json.loads((trained.save_path / "result.json").read_text())
    assert result["exit_code"] == 5
    assert train(trained.settings(run={"epochs": 3}), progress=SilentProgress()).is_resumed


@pytest.mark.parametrize("num_bytes", [0, 64, 3000])
def test_a_disk_that_is_full_at_the_start_is_a_named_error(
    tiny: TinyInputs, num_bytes: int
) -> None:
    with no_file_over(num_bytes), pytest.raises(MachineError) as error:
        train(tiny.settings(), progress=SilentProgress())

    assert f"`{tiny.save_path}` cannot be written: File too large" in error.value.message
    assert " free)" in error.value.message
    left = names(tiny.save_path) if tiny.save_path.exists() else set()
    assert left <= {"run.lock", "data_index.json", "settings.json", "result.json"}
    assert train(tiny.settings(run={"epochs": 1}), progress=SilentProgress()).step == 9


def test_a_full_disk_has_no_room_for_a_lock_or_a_record(tmp_path: Path) -> None:
    with no_file_over(0):
        with (
            pytest.raises(MachineError, match="cannot be written: File too large"),
            locking(tmp_path / "lock", in_use=lambda _: MachineError("taken")) as lock,
        ):
            lock.write()
        with (
            pytest.raises(MachineError, match="cannot be written: File too large"),
            replacing(tmp_path / "file") as temporary,
        ):
            write_json({"a": 1}, temporary)

    assert names(tmp_path) == {"lock"}


def test_too_little_room_is_told_in_units_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap: 0.00 GiB free.
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5_300_000}))

    assert [format_bytes(x) for x in (0, 999, 5_300_000, 3 * 2**30, 2**41)] == [
        "0 bytes",
        "999 bytes",
        "5.1 MiB",
        "3.0 GiB",
        "2.0 TiB",
    ]
    with pytest.raises(MachineError, match=r"has 5\.1 MiB free, x needs 9\.5 MiB"):
        check_free_space(tmp_path, 10_000_000, what="x", hint="y")


def test_the_name_of_a_file_that_is_not_whole_is_never_another_files(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")

    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == {"file"}


def test_a_run_folder_can_be_opened_again_after_a_full_disk(tmp_path: Path) -> None:
    with (
        no_file_over(0),
        pytest.raises(MachineError),
        RunFolder.open(tmp_path / "run", resume=True, is_restart=False),
    ):
        pass

    with RunFolder.open(tmp_path / "run", resume=True, is_restart=False) as folder:
        assert folder.latest is None
