"""Folders that appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from speculators_cli.core.files import replacing_folder

KILL = """
import os, signal, sys
from pathlib import Path
from speculators_cli.core.files import replacing_folder
real, calls = Path.rename, []
def rename(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.rename = rename
with replacing_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("new")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An old folder."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served/weights").write_text("old")
    return tmp_path / "served"


@pytest.mark.parametrize("kill_at", [1, 2])
def test_what_a_killed_process_moved_away_comes_back(folder: Path, kill_at: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, folder, str(kill_at)], check=False)
    assert done.returncode == -9

    with pytest.raises(ValueError, match="stopped"), replacing_folder(folder):
        raise ValueError("stopped")

    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["served"]


def test_a_new_folder_takes_the_place_of_the_old(folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        (temporary / "other").write_text("new")
        assert (folder / "weights").read_text() == "old"

    assert [path.name for path in folder.iterdir()] == ["other"]
    assert [path.name for path in folder.parent.iterdir()] == ["served"]
