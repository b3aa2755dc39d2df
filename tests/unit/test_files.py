"""Files that are opened without waiting, folders that appear whole or not at all."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import locking, open_regular
from speculators_cli.core.scratch import replacing_folder

KILL = """
import os, signal, sys
from pathlib import Path
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import locking
from speculators_cli.core.scratch import replacing_folder
real, calls = Path.rename, []
def rename(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.rename = rename
with replacing_folder(Path(sys.argv[1]), flag="--output-dir") as folder:
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

    with pytest.raises(ValueError, match="stopped"), replacing_folder(folder, flag="--output-dir"):
        raise ValueError("stopped")

    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["served"]


def test_a_new_folder_takes_the_place_of_the_old(folder: Path) -> None:
    with replacing_folder(folder, flag="--output-dir") as temporary:
        (temporary / "other").write_text("new")
        assert (folder / "weights").read_text() == "old"

    assert [path.name for path in folder.iterdir()] == ["other"]
    assert [path.name for path in folder.parent.iterdir()] == ["served"]


HOLD = """
import sys
from pathlib import Path
from speculators_cli.core.scratch import replacing_folder
with replacing_folder(Path(sys.argv[1]), flag="--output-dir") as folder:
    (folder / "weights").write_text("first")
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_writes_is_refused(
    folder: Path, other: subprocess.Popen[str]
) -> None:
    with (
        pytest.raises(SettingsError, match=f"`--output-dir`: .* by process {other.pid} on"),
        replacing_folder(folder, flag="--output-dir"),
    ):
        pass

    other.communicate("go on\n")
    assert other.returncode == 0
    assert (folder / "weights").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["served"]


def test_a_killed_process_holds_no_lock(folder: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()

    with replacing_folder(folder, flag="--output-dir") as temporary:
        (temporary / "weights").write_text("second")

    assert (folder / "weights").read_text() == "second"
    assert [path.name for path in folder.parent.iterdir()] == ["served"]


def test_a_folder_of_a_longer_name_is_left_alone(folder: Path) -> None:
    with replacing_folder(folder.with_name("served.2"), flag="--output-dir") as longer:
        with replacing_folder(folder, flag="--output-dir"):
            pass

        assert longer.exists()


def test_a_lock_that_its_holder_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lock"
    monkeypatch.setattr("fcntl.flock", lambda *_: file.unlink())

    with (
        pytest.raises(SettingsError, match="by a process that ended just now"),
        locking(file, in_use=lambda holder: SettingsError(f"held by {holder}")),
    ):
        pass

    assert not file.exists()


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file))


IRREGULAR: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": make_socket,
    "a device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    IRREGULAR[kind](tmp_path / "config.json")

    with pytest.raises(OSError, match=f"{kind}, not a file"):
        open_regular(tmp_path / "config.json")


def test_a_file_that_becomes_a_fifo_is_refused_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr("speculators_cli.core.files.check_regular", lambda _: None)

    with pytest.raises(OSError, match="a FIFO, not a file"):
        open_regular(tmp_path / "file")


def test_a_file_is_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")

    with open_regular(tmp_path / "link") as stream:
        assert stream.read() == b"0123456789"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")
