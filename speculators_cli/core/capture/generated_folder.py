"""The output folder of `generate-data`: shards of tokens, samples, and their manifests."""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators_cli.core.data.token_shards import (
    MANIFEST_NAME,
    is_shard_name,
    shard_name,
)
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import (
    TEMPORARY,
    check_output_dir,
    describe_holder,
    disk_errors,
    find_holder,
    locking,
    replacing,
    write_json,
)
from speculators_cli.core.place import Place
from speculators_cli.core.reading import read_json_object, refusing

DONE_NAME = "done.json"
REFUSED_NAME = "refused"  # marks contents that a check has refused
LOCK_NAME = "generate-data.lock"
RANK_LOCKS = "generate-data.rank*.lock"  # of the ranks other than the first
SCHEMA_VERSION = 1
POLL_SECONDS = 0.2
SAMPLES_OF = re.compile(r"\d{5,}")  # folder of the samples of a shard
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
    def locked(self, place: Place) -> Iterator[None]:
        """Hold the folder for a rank: another run that writes into it is refused.

        Each rank has a lock of its own, which is released when its process ends for any reason. The
        first one is refused while a rank of another run is left.

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

        name = RANK_LOCKS.replace("*", str(place.rank)) if place.rank else LOCK_NAME
        file = self.folder / name
        with locking(file, in_use=in_use) as lock:
            try:
                lock.write(run=place.run)
                if place.rank == 0:
                    self._refuse_other_runs(place.run, in_use)
                yield
            finally:
                file.unlink(missing_ok=True)

    def remove_rank_locks(self) -> None:
        """Remove what killed ranks left, once all ranks have written their files."""
        for file in self.folder.glob(RANK_LOCKS):
            file.unlink(missing_ok=True)

    def _refuse_other_runs(self, run: str, in_use: Callable[[str], SettingsError]) -> None:
        for file in self.folder.glob(RANK_LOCKS):
            holder = find_holder(file)
            if holder is not None and holder.get("run") != run:
                raise in_use(describe_holder(holder))


def agree(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a stage, or check that the folder was begun with the same one.

    A folder that another run has begun is begun anew if that run wrote nothing else, or has refused
    its contents itself: they are of no use.

    Args:
        folder: Of the stage; created if it is missing.
        manifest: Everything that the contents of the folder depend on.

    Raises:
        SettingsError: The folder has contents of another run, or of none.
    """
    file = folder / MANIFEST_NAME
    if folder.exists() and _is_useless(folder) and not has_manifest(folder, manifest):
        _remove_contents(folder)
    if not file.exists():
        if _has_contents(folder):
            raise SettingsError(
                f"`--output-dir`: `{folder}` has files that `generate-data` did not write",
                hint="Choose another `--output-dir`",
            )
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            write_json({"schema_version": SCHEMA_VERSION, **manifest}, temporary)
    _check_manifest(folder, manifest)


def wait_for_agreement(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Wait until another rank has begun or continued a stage.

    Raises:
        SettingsError: The folder has contents of another run.
    """
    # In this order: refused contents are removed before their mark.
    while _is_useless(folder) or not (folder / MANIFEST_NAME).exists():
        if has_manifest(folder, manifest):
            return
        time.sleep(POLL_SECONDS)
    _check_manifest(folder, manifest)


def _has_contents(folder: Path) -> bool:
    """Whether there is more than what a run writes before all else."""
    own = (MANIFEST_NAME, REFUSED_NAME)
    return folder.exists() and any(
        x.name not in own and not LEFTOVER.fullmatch(x.name) for x in folder.iterdir()
    )


def _is_useless(folder: Path) -> bool:
    return (folder / REFUSED_NAME).exists() or not _has_contents(folder)


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    file = folder / MANIFEST_NAME
    before = read_json(file)
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


def has_manifest(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the folder of a stage was begun with this manifest."""
    file = folder / MANIFEST_NAME
    return file.exists() and read_json(file) == {"schema_version": SCHEMA_VERSION, **manifest}


def refuse_contents(folder: Path) -> None:
    """Mark the contents of a stage as useless: a run with other inputs may replace them."""
    with disk_errors(folder):
        (folder / REFUSED_NAME).touch()


def accept_contents(folder: Path) -> None:
    """Say that the contents of a stage have passed all checks."""
    if (folder / REFUSED_NAME).exists():
        (folder / REFUSED_NAME).unlink()


def _remove_contents(folder: Path) -> None:
    """Remove the files of a stage: its manifest before all others, their mark after them."""
    with disk_errors(folder):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in list(folder.iterdir()):
            if is_shard_name(path.name):
                path.unlink()
            elif SAMPLES_OF.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        remove_leftovers(folder)
        (folder / REFUSED_NAME).unlink(missing_ok=True)


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
