"""The save path: checked before anything is loaded, locked while a run holds it."""

import os
from pathlib import Path

import pytest

from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.training.checkpoint import RunFolder

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
