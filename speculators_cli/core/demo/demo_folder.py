"""The output folder of a demo, from which only files written by a demo are removed.

Incomplete files are in a scratch folder with a marker. The checksum of each complete file is
recorded in demo.json before the file is moved into place, so that an interrupted demo can be rerun.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators_cli.core.drafts.checkpoint_reader import MANIFEST_NAME, hash_file
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import check_output_dir, replacing, write_json
from speculators_cli.core.reading import UnreadableError, read_json_object
from speculators_cli.core.scratch import Scratch
from speculators_cli.core.training.save_path import check_save_path, clear_save_path

FLAG = "--output-dir"
RESULT_NAME = "demo.json"
SCRATCH_NAME = ".speculators-demo"
CHECKPOINTS = "checkpoints"  # its contents identify it as written by a run
OWN_NAMES = ("verifier", "prompts.jsonl", "data", "d2t.npy", "t2d.npy")
MADE_BY = {"made_by": "speculators demo"}
FILES = "files"  # in the result: checksums of the demo's files, by path


class DemoFolder:
    """The output folder, after removal of an earlier demo's files.

    Args:
        folder: May be missing.

    Raises:
        SettingsError: It cannot be written, or has files that were not created by the demo.
        CheckpointError: Its checkpoints are not those of a run.
    """

    def __init__(self, folder: Path) -> None:
        check_output_dir(folder, flag=FLAG)
        self.folder = folder
        self.scratch = Scratch(folder / SCRATCH_NAME)
        self.files: dict[str, str] = {}
        earlier = self._read_earlier()
        self._check(earlier)
        folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        self.write_result({})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the figures of a demo, empty at first, or the error that ended it."""
        with replacing(self.folder / RESULT_NAME) as temporary:
            write_json({**MADE_BY, **result, FILES: self.files}, temporary)

    @contextmanager
    def placing(self, *names: str) -> Iterator[Path]:
        """Yield a folder to write files or folders of these names in, then move them into place."""
        folder = self.scratch.open()
        yield folder
        for name in names:
            for file in _files_below(folder / name):
                self.files[file.relative_to(folder).as_posix()] = hash_file(file)
        self.write_result({})
        for name in names:
            (folder / name).rename(self.folder / name)
        self.scratch.clear()

    def add_checkpoints(self) -> None:
        """Record the checkpoints of the demo's run; a folder with other files is never removed."""
        for file in self._manifests():
            self.files[self._name(file)] = hash_file(file)
        self.write_result({})

    def _manifests(self) -> list[Path]:
        files = (self.folder / CHECKPOINTS).glob(f"*/{MANIFEST_NAME}")
        return sorted(file for file in files if not file.parents[1].is_symlink())

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _read_earlier(self) -> dict[str, Any]:
        """Return the checksums of an earlier demo's files, by their path in the folder."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return {}
        try:
            content = read_json_object(self.folder / RESULT_NAME)
        except UnreadableError:
            content = {}
        if not content.items() >= MADE_BY.items():
            raise SettingsError(
                f"`{FLAG}`: `{self.folder}` has files that were not created by the demo",
                hint="Pass another folder",
            )
        files = content.get(FILES)
        return files if isinstance(files, dict) else {}

    def _check(self, earlier: Mapping[str, Any]) -> None:
        self.scratch.check(self._foreign)
        for name in OWN_NAMES:
            for file in _files_below(self.folder / name):
                is_file = file.is_file() and not file.is_symlink()
                if not is_file or hash_file(file) != earlier.get(self._name(file)):
                    raise self._foreign(file)
        check_save_path(self.folder / CHECKPOINTS, resume=False)
        # A demo that was interrupted during training has not recorded its checkpoints.
        if any(name.startswith(f"{CHECKPOINTS}/") for name in earlier):
            for file in self._manifests():
                if hash_file(file) != earlier.get(self._name(file)):
                    raise self._foreign(file.parents[1])

    def _foreign(self, file: Path) -> SettingsError:
        return SettingsError(
            f"`{FLAG}`: `{file}` was not created by a demo, and would be removed",
            hint="Move it elsewhere, or pass another folder",
        )

    def _clear(self) -> None:
        """Remove the files that `_check` has identified as a demo's."""
        self.scratch.clear()
        clear_save_path(self.folder / CHECKPOINTS)
        for name in OWN_NAMES:
            path = self.folder / name
            if not path.is_dir():
                path.unlink(missing_ok=True)
                continue
            for file in _files_below(path):
                file.unlink()
            for folder in (*sorted(path.rglob("*"), reverse=True), path):
                folder.rmdir()


def _files_below(path: Path) -> list[Path]:
    """Return a path itself, or all files in it."""
    if path.is_symlink() or path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
