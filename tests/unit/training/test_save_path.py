"""The save path: checked before anything is loaded, locked while a run holds it."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.core.training.run_folder import RunFolder
from tests.run_files import tree
from tests.tiny_run import TinyInputs

NOBODY = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_refused() -> None:
    # Root may write anywhere, so the check is made as somebody else.
    pid = os.fork()
    if pid == 0:
        os.setuid(NOBODY)
        try:
            check_output_dir(Path("/usr/speculators-checkpoints"), flag="--save-path")
        except SettingsError as error:
            os._exit(0 if "cannot be written" in error.message else 2)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_second_run_on_a_save_path_is_refused_by_name(tmp_path: Path) -> None:
    with (
        RunFolder.open(tmp_path, resume=True, is_restart=False),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on") as error,
        RunFolder.open(tmp_path, resume=True, is_restart=False),
    ):
        pass

    assert error.value.exit_code == 4
    with RunFolder.open(tmp_path, resume=True, is_restart=False):
        """The lock is free again."""


def test_a_save_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match="is not a folder"):
        check_output_dir(tmp_path / "file" / "checkpoints", flag="--save-path")


def train_tiny(tiny: TinyInputs, **changes: Any) -> None:
    train(tiny.settings(run={"epochs": 1, "max_steps": 3, **changes}), progress=SilentProgress())


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "0": lambda path: path.mkdir(),
    "step-8": lambda path: path.write_text("mine"),
    "7": lambda path: path.symlink_to("/usr"),
    "checkpoint_best": lambda path: path.mkdir(),
    "settings.json": lambda path: path.write_text('{"mine": 1}'),
    "metrics.jsonl": lambda path: path.write_text('{"step": 1, "loss": 2.0}\n'),
    "result.json": lambda path: path.mkdir(),
    "data_index.json": lambda path: path.write_text("[]"),
    "run.lock": lambda path: path.write_text("mine"),
    ".speculators-run": lambda path: path.write_text("mine"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("resume", [True, False])
def test_what_no_run_wrote_is_refused_by_name_before_anything_starts(
    tiny: TinyInputs, name: str, resume: bool
) -> None:
    tiny.save_path.mkdir()
    path = tiny.save_path / name
    IN_THE_WAY[name](path)
    if path.is_dir() and not path.is_symlink():
        (path / "mine.pt").write_text("mine")
    before = tree(tiny.save_path)

    with pytest.raises(CheckpointError, match=f"`{re.escape(str(path))}`"):
        train_tiny(tiny, resume_from_checkpoint=resume)

    assert tree(tiny.save_path) == before


@pytest.mark.parametrize("name", [".tmp-0", ".tmp-mine", ".replaced-0", "notes", ".speculators"])
def test_what_is_not_in_the_way_stays(tiny: TinyInputs, name: str) -> None:
    (tiny.save_path / name).mkdir(parents=True)
    (tiny.save_path / name / "mine.pt").write_text("mine")
    (tiny.save_path / ".tmp-mine.txt").write_text("mine")

    train_tiny(tiny)
    train_tiny(tiny, resume_from_checkpoint=False)

    assert (tiny.save_path / name / "mine.pt").read_text() == "mine"
    assert (tiny.save_path / ".tmp-mine.txt").read_text() == "mine"
    assert (tiny.save_path / "step-3").is_dir()


def test_a_checkpoint_with_files_of_others_is_not_replaced(trained: TinyInputs) -> None:
    (trained.save_path / "0/notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"cannot be replaced: `notes\.txt` in it"):
        train_tiny(trained, resume_from_checkpoint=False)
    train(trained.settings(run={"epochs": 3}), progress=SilentProgress())

    assert (trained.save_path / "0/notes.txt").read_text() == "mine"
    assert (trained.save_path / "2").is_dir()


def test_pruning_leaves_checkpoints_that_were_renamed_or_hold_more(trained: TinyInputs) -> None:
    (trained.save_path / "0/notes.txt").write_text("mine")
    shutil.copytree(trained.save_path / "1", trained.save_path / "kept")

    train(
        trained.settings(run={"epochs": 4}, checkpoints={"keep_checkpoints": 1}),
        progress=SilentProgress(),
    )

    assert (trained.save_path / "0/notes.txt").read_text() == "mine"
    assert (trained.save_path / "kept/model.safetensors").exists()
    best = str((trained.save_path / "checkpoint_best").readlink())
    names = {f.name for f in trained.save_path.iterdir() if f.is_dir() and not f.is_symlink()}
    assert names == {"0", "kept", "3", best}


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_save_path_among_the_samples_is_refused(
    tiny: TinyInputs, data_dir: Path, below: str
) -> None:
    before = tree(data_dir)
    settings = tiny.settings(run={"save_path": data_dir / below}, data={"data_path": (data_dir,)})

    with pytest.raises(SettingsError, match="folder of samples"):
        train(settings, progress=SilentProgress())

    assert tree(data_dir) == before


def test_samples_in_the_place_of_a_checkpoint_are_not_lost(
    tiny: TinyInputs, data_dir: Path
) -> None:
    data = tiny.save_path / "1"
    tiny.save_path.mkdir()
    data_dir.rename(data)
    before = tree(data)

    with pytest.raises(CheckpointError, match="was not written by"):
        train(tiny.settings(data={"data_path": (data,)}), progress=SilentProgress())

    assert tree(data) == before


def test_leftovers_of_a_killed_run_of_an_earlier_version_go_where_they_prove_its(
    trained: TinyInputs,
) -> None:
    path = trained.save_path
    shutil.copytree(path / "0", path / ".tmp-0")  # all but renamed
    (path / "1").rename(path / ".replaced-1")  # its successor was never renamed
    (path / ".tmp-metrics.jsonl.71").write_text('{"step": 1, "split": "tra')
    (path / ".tmp-2/trainer").mkdir(parents=True)
    (path / ".tmp-2/model.safetensors").write_bytes(b"torn")  # proves nothing
    (path / "0/config.json").unlink()  # a kill in the middle of its removal

    train(trained.settings(run={"epochs": 2}), progress=SilentProgress())

    names = {f.name for f in path.iterdir() if f.name.startswith(".")}
    assert names == {".tmp-2"}
    assert (path / "1/trainer/manifest.json").exists()


def test_an_old_run_that_is_removed_half_is_in_nobodys_way(
    trained: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_half(folder: Path, **_: object) -> None:
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(trained, resume_from_checkpoint=False)
    report = train(trained.settings(run={"epochs": 1}), progress=SilentProgress())

    assert report.is_resumed
    assert {f.name for f in trained.save_path.iterdir() if f.is_dir()} >= {"step-3", "0"}
    assert not (trained.save_path / "1").exists()
    assert not (trained.save_path / ".speculators-run").exists()


def test_a_killed_new_run_is_resumed_although_its_clock_was_set_back(
    trained: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    with monkeypatch.context() as patch:
        # Killed before the old run's checkpoints are gone.
        patch.setattr(RunFolder, "_discard", lambda *_: None)
        train_tiny(trained, resume_from_checkpoint=False)
    assert (trained.save_path / "1").is_dir()

    report = train(trained.settings(run={"epochs": 1}), progress=SilentProgress())

    assert report.is_resumed
    assert report.step == 9
    assert not (trained.save_path / "1").exists()
