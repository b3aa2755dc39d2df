"""Which files a save path may contain: those of this program, identified by their contents.

Nothing is removed or replaced because of its name only.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from speculators_cli.core.data.token_shards import MANIFEST_NAME
from speculators_cli.core.drafts.checkpoint_reader import (
    BEST_LINK,
    find_foreign,
    is_ours,
    read_checkpoint,
)
from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.files import TEMPORARY
from speculators_cli.core.models.repo_files import CONFIG_NAME
from speculators_cli.core.models.train_state import is_checkpoint_name
from speculators_cli.core.scratch import Scratch, remove

LOCK_NAME, INDEX_NAME = "run.lock", "data_index.json"
SETTINGS_NAME, METRICS_NAME, RESULT_NAME = "settings.json", "metrics.jsonl", "result.json"
# How each record of a run begins. An empty file can be replaced without loss.
RECORDS = {
    LOCK_NAME: rb'\{"pid": \d+, "host": ',
    INDEX_NAME: rb'\{"index_version": \d+, "format": ',
    SETTINGS_NAME: rb'\{\s*"draft": \{\s*"verifier_name_or_path": ',
    METRICS_NAME: rb'\{"step": \d+, "split": ',
    RESULT_NAME: rb'\{\s*"(error|checkpoint)": ',
}
TOKENS_NAME = "tokens"
SCRATCH_NAME = ".speculators-run"
LEFTOVER = re.compile(rf"{re.escape(TEMPORARY)}({'|'.join(map(re.escape, RECORDS))})\.\d+(-\d+)?")
REPLACED = ".replaced-"  # prefix used by versions without a scratch folder


def scratch_of(save_path: Path) -> Scratch:
    """The folder in a save path for incomplete files."""
    return Scratch(save_path / SCRATCH_NAME)


def check_apart(save_path: Path, data_paths: tuple[Path, ...]) -> None:
    """Check that a run does not write into its samples.

    Raises:
        SettingsError: The save path is a folder of samples, or inside one.
    """
    resolved = save_path.resolve()
    for data_path in data_paths:
        if data_path.resolve() in (resolved, *resolved.parents):
            place = "is" if data_path.resolve() == resolved else "is inside"
            raise SettingsError(
                f"`--save-path`: `{save_path}` {place} the folder of samples `{data_path}`",
                hint="Choose a `--save-path` outside the samples",
            )


def check_save_path(save_path: Path, *, resume: bool) -> None:
    """Check, without writing, that no other files are in the way of a run.

    Args:
        save_path: May be missing.
        resume: Whether its checkpoints are resumed, or replaced.

    Raises:
        CheckpointError: Another file or folder is in the way.
    """
    for path in sorted(save_path.iterdir()) if save_path.is_dir() else []:
        problem = _find_problem(path, resume=resume)
        if problem is not None:
            raise CheckpointError(
                f"`{path}` {problem}",
                hint="Move it elsewhere, or choose another `--save-path`",
            )


def _find_problem(path: Path, *, resume: bool) -> str | None:
    if path.name in RECORDS:
        return None if _is_record(path, path.name) else "was not written by `speculators train`"
    if path.name == BEST_LINK:
        is_own = path.is_symlink() and is_checkpoint_name(str(path.readlink()))
        return None if is_own else "is not a link written by `speculators train`"
    if path.name == TOKENS_NAME and (path / MANIFEST_NAME).is_file():
        return None  # written by the run before it began, from conversations
    if path.name == SCRATCH_NAME:
        return None if Scratch(path).is_own else "is not a folder written by `speculators train`"
    if is_checkpoint_name(path.name):
        return _find_problem_of_checkpoint(path, resume=resume)
    looks_like_one = (
        path.is_dir()
        and not path.name.startswith(".")
        and ((path / CONFIG_NAME).exists() or any(path.glob("*.safetensors")))
    )
    if looks_like_one and not is_ours(path):
        return "is a checkpoint that `speculators train` did not write"
    return None


def _find_problem_of_checkpoint(path: Path, *, resume: bool) -> str | None:
    if path.is_symlink() or not is_ours(path):
        return "was not written by `speculators train`"
    foreign = find_foreign(path)
    # A complete checkpoint that is resumed is kept; any other may be replaced.
    if foreign is not None and not (resume and read_checkpoint(path) is not None):
        return f"cannot be replaced: `{foreign.name}` in it was not written by `train`"
    return None


def _is_record(path: Path, name: str) -> bool:
    """Whether a file begins like a record of a run, or is empty."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(4096)
    return not start or re.match(RECORDS[name], start) is not None


def clear_save_path(save_path: Path) -> None:
    """Remove files written by runs, after `check_save_path`; all others are kept."""
    if not save_path.is_dir():
        return
    remove_leftovers(save_path)
    scratch = scratch_of(save_path)
    for path in list(save_path.iterdir()):
        if path.name in RECORDS or path.name == BEST_LINK:
            path.unlink()
        elif is_checkpoint_name(path.name):
            remove(scratch_move(scratch, path))
    scratch.clear()
    with suppress(OSError):  # it contains other files
        save_path.rmdir()


def remove_leftovers(save_path: Path) -> None:
    """Restore a checkpoint that was being replaced; remove incomplete files."""
    scratch = scratch_of(save_path)
    if scratch.exists:
        for replaced in scratch.folder.glob("replaced-*"):
            folder = save_path / replaced.name.removeprefix("replaced-")
            if not os.path.lexists(folder):
                replaced.rename(folder)
        scratch.clear()
    for leftover in _find_old_leftovers(save_path):
        name = leftover.name.removeprefix(REPLACED)
        if leftover.name.startswith(REPLACED) and not os.path.lexists(save_path / name):
            leftover.rename(save_path / name)
        else:
            remove(scratch_move(scratch, leftover))
    for path in list(save_path.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is not None and _is_record(path, match[1]):
            path.unlink()
    scratch.clear()


def scratch_move(scratch: Scratch, path: Path) -> Path:
    """Move a file or folder of a run into the scratch folder; returns its new path."""
    place = scratch.open() / f"removed-{path.name}"
    path.rename(place)
    return place


def _find_old_leftovers(save_path: Path) -> Iterator[Path]:
    """Leftovers of a killed run of an earlier version, identified by their contents."""
    for path in list(save_path.iterdir()):
        for prefix in (REPLACED, TEMPORARY):
            name = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and is_checkpoint_name(name):
                is_plain = path.is_dir() and not path.is_symlink()
                if is_plain and is_ours(path) and find_foreign(path) is None:
                    yield path
