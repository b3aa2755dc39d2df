"""The output folder of `generate-data`: shards of tokens, samples, and their manifests."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators_cli.core.data.token_shards import MANIFEST_NAME, shard_name
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import (
    TEMPORARY,
    check_output_dir,
    disk_errors,
    locking,
    replacing,
    write_json,
)
from speculators_cli.core.reading import read_json_object, refusing

DONE_NAME = "done.json"
LOCK_NAME = "generate-data.lock"
SCHEMA_VERSION = 1
# Incomplete files of a killed run, by the names that are given to them.
LEFTOVER = re.compile(re.escape(TEMPORARY) + r".+\.(pt|json|safetensors)\.\d+(-\d+)?")


@dataclass(frozen=True)
class GeneratedFolder:
    """Paths below the output folder."""

    folder: Path

    @property
    def tokens(self) -> Path:
        """Folder of the shards of tokens."""
        return self.folder / "tokens"

    @property
    def samples(self) -> Path:
        """Folder of the samples, with a subfolder per shard."""
        return self.folder / "samples"

    def shard(self, number: int) -> Path:
        """File of a shard of tokens; exists once it is complete."""
        return self.tokens / shard_name(number)

    def samples_of(self, number: int) -> Path:
        """Folder of the samples of a shard."""
        return self.samples / f"{number:05d}"

    def done(self, number: int) -> Path:
        """File with the counts of a shard's samples; exists once all of them are written."""
        return self.samples_of(number) / DONE_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: another run that writes into it is refused.

        Raises:
            SettingsError: It cannot be written, or another process is writing into it.
        """
        check_output_dir(self.folder, flag="--output-dir")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

        def in_use(holder: str) -> SettingsError:
            return SettingsError(
                f"`--output-dir`: `{self.folder}` is being written by {holder}",
                hint="Wait for it to end, or choose another folder",
            )

        file = self.folder / LOCK_NAME
        with locking(file, in_use=in_use) as lock:
            try:
                lock.write()
                yield
            finally:
                file.unlink(missing_ok=True)


def agree(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a stage, or check that the folder was begun with the same one.

    Args:
        folder: Of the stage; created if it is missing.
        manifest: Everything that the contents of the folder depend on.

    Raises:
        SettingsError: The folder has contents of another run, or of none.
    """
    file = folder / MANIFEST_NAME
    if not file.exists():
        if folder.exists() and any(not LEFTOVER.fullmatch(x.name) for x in folder.iterdir()):
            raise SettingsError(
                f"`--output-dir`: `{folder}` has files that `generate-data` did not write",
                hint="Choose another `--output-dir`",
            )
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            write_json({"schema_version": SCHEMA_VERSION, **manifest}, temporary)
        return
    with refusing(DataError):
        before = read_json_object(file)
    different = [
        f"  {key}: `{_show(before.get(key))}` then, `{_show(manifest.get(key))}` now"
        for key in sorted(manifest.keys() | before.keys() - {"schema_version"})
        if before.get(key) != manifest.get(key)
    ]
    if different:
        raise SettingsError(
            "\n".join([f"`--output-dir`: `{folder}` was generated with other inputs", *different]),
            hint="Choose another `--output-dir`, or rerun the command that it was begun with",
        )


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete files of killed runs; nothing may be writing into the folder itself."""
    for file in folder.glob(f"{TEMPORARY}*"):
        if LEFTOVER.fullmatch(file.name) and file.is_file() and not file.is_symlink():
            file.unlink()


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of this package.

    Raises:
        DataError: It is damaged.
    """
    with refusing(DataError):
        return read_json_object(file, fix="Remove the file, then rerun the command")


def _show(value: object) -> str:
    return str(value)[:80]
