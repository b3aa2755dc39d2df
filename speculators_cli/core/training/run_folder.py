"""Checkpoints of a run: each is absent or complete, even if the process is killed."""

import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speculators_cli.core.drafts.checkpoint_reader import (
    BEST_LINK,
    FILE_NAMES,
    MANIFEST_NAME,
    MOMENTS_NAME,
    SCHEMA_VERSION,
    STATE_NAME,
    TRAINER_DIR,
    Checkpoint,
    Damaged,
    FileRecord,
    find_checkpoints,
    find_foreign,
    hash_file,
    is_ours,
    list_checkpoints,
    read_checkpoint,
)
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.files import (
    check_free_space,
    disk_error,
    disk_errors,
    locking,
    replacing,
    sync,
    write_json,
)
from speculators_cli.core.models.repo_files import CONFIG_NAME, WEIGHTS_NAME
from speculators_cli.core.models.train_state import is_checkpoint_name
from speculators_cli.core.scratch import remove
from speculators_cli.core.training.save_path import (
    LOCK_NAME,
    METRICS_NAME,
    RESULT_NAME,
    SETTINGS_NAME,
    check_save_path,
    remove_leftovers,
    scratch_move,
    scratch_of,
)
from speculators_cli.core.training.snapshot import Snapshot
from speculators_cli.core.training.tensor_file import write_tensors

MORE_ROOM = "Free space on the disk, then rerun the same command to resume"


class RunFolder:
    """The save path of a run, locked; only rank 0 has one.

    Args:
        save_path: Contains the checkpoints and records of the run.
        last_id: Id of the last run in the folder, if it is resumed regardless of `resume`.
        resume: Resume the latest checkpoint; otherwise start over beside the old ones.

    Raises:
        CheckpointError: All checkpoints that could be resumed are damaged.
    """

    def __init__(self, save_path: Path, *, last_id: str | None, resume: bool) -> None:
        self.save_path = save_path
        self.scratch = scratch_of(save_path)
        whole, damaged = list_checkpoints(save_path)
        self.damaged: list[Damaged] = []  # found while searching for one to resume
        self.latest: Checkpoint | None = None  # to resume
        if not resume:
            own = [c for c in whole if last_id is not None and c.state.run_id == last_id]
            # Damaged checkpoints found by an elastic restart have no run id, and are replaced.
            damaged = []
        else:
            own = whole
        if own or damaged:
            self.latest, self.damaged = choose_latest(own, damaged, save_path)
        newest = max((c.state.generation for c in whole), default=0)
        # Checkpoints of earlier runs, removed after this run has saved one.
        if self.latest is not None:
            state = self.latest.state
            self.run_id, self.generation = state.run_id, state.generation
            self.old = [c for c in whole if c.state.generation < state.generation]
        else:
            self.run_id, self.generation = last_id or uuid.uuid4().hex, newest + 1
            self.old = whole

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line: every log step and validation."""
        return self.save_path / METRICS_NAME

    @property
    def settings_file(self) -> Path:
        """All settings of the run, defaults included."""
        return self.save_path / SETTINGS_NAME

    @classmethod
    @contextmanager
    def open(cls, save_path: Path, *, resume: bool, is_restart: bool) -> Iterator["RunFolder"]:
        """Lock a save path, clean up after a killed run, choose the checkpoint to resume.

        Args:
            save_path: Created if missing.
            resume: Resume the latest checkpoint; otherwise start over beside the old ones.
            is_restart: The launcher restarted this run: it resumes regardless of `resume`.

        Raises:
            CheckpointError: Another run has locked the folder, other files are in the way, or its
                checkpoints are damaged.
            MachineError: The disk is full.
        """
        check_save_path(save_path, resume=resume)
        with disk_errors(save_path):
            save_path.mkdir(parents=True, exist_ok=True)

        def in_use(holder: str) -> CheckpointError:
            return CheckpointError(
                f"`{save_path}` is in use by {holder}",
                hint="Wait for that run to end, or choose another `--save-path`",
            )

        with locking(save_path / LOCK_NAME, in_use=in_use) as lock:
            remove_leftovers(save_path)
            last_id = lock.last.get("run_id") if is_restart else None
            last_id = last_id if isinstance(last_id, str) else None
            folder = cls(save_path, last_id=last_id, resume=resume)
            lock.write(run_id=folder.run_id)
            yield folder

    def save(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint under its name, then remove checkpoints of earlier runs.

        Raises:
            MachineError: The disk is full or fails; existing checkpoints are intact.
            CheckpointError: Another file or folder is in its place.
        """
        tensors = (*snapshot.tensors.values(), *snapshot.moments.values())
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        check_free_space(self.save_path, num_bytes, what="a checkpoint", hint=MORE_ROOM)
        folder = self.save_path / snapshot.name
        try:
            new = self.scratch.open() / f"new-{snapshot.name}"
            (new / TRAINER_DIR).mkdir(parents=True)
            _write_files(snapshot, new)
            self._put_in_place(new, folder)
        except OSError as error:
            self.scratch.clear()
            failed = disk_error(folder, f"{error.strerror}", num_bytes=num_bytes)
            failed.hint = MORE_ROOM
            raise failed from None
        self.latest = read_checkpoint(folder)
        for checkpoint in self.old:
            if checkpoint.folder != folder:
                self._discard(checkpoint.folder)
        self.old = []
        best = self.save_path / BEST_LINK
        if best.is_symlink() and not best.exists():
            best.unlink()  # it pointed to a checkpoint of an earlier run
        self.scratch.clear()

    def set_best(self, name: str) -> None:
        """Point `checkpoint_best` at a checkpoint, atomically."""
        with disk_errors(self.save_path):
            new = self.scratch.open() / BEST_LINK
            new.unlink(missing_ok=True)
            new.symlink_to(name)
            new.replace(self.save_path / BEST_LINK)
            self.scratch.clear()

    def prune(self, keep: int | None) -> None:
        """Remove all checkpoints of this run except the `keep` latest and the best."""
        if keep is None:
            return
        link = self.save_path / BEST_LINK
        best = str(link.readlink()) if link.is_symlink() else None
        found = [c for c in find_checkpoints(self.save_path) if c.state.run_id == self.run_id]
        for checkpoint in found[:-keep]:
            if checkpoint.folder.name != best:
                self._discard(checkpoint.folder)
        self.scratch.clear()

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write how the run ended: torchrun hides the exit code."""
        with replacing(self.save_path / RESULT_NAME) as temporary:
            write_json(result, temporary)

    def _put_in_place(self, new: Path, folder: Path) -> None:
        """Rename a complete folder to its final name; the one it replaces is removed afterwards."""
        if os.path.lexists(folder):
            if folder.is_symlink() or not is_ours(folder) or find_foreign(folder) is not None:
                self.scratch.clear()
                raise CheckpointError(
                    f"`{folder}` cannot be saved: another file or folder is in its place",
                    hint=f"Move `{folder}` elsewhere, then rerun the same command to resume",
                )
            replaced = self.scratch.folder / f"replaced-{folder.name}"
            folder.rename(replaced)
            try:
                new.rename(folder)
            except OSError:
                replaced.rename(folder)
                raise
            # From here on it must not be restored.
            replaced.rename(self.scratch.folder / f"removed-{folder.name}")
        else:
            new.rename(folder)
        sync(self.save_path)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint; one that was renamed or contains other files is kept."""
        if not is_checkpoint_name(folder.name) or find_foreign(folder) is not None:
            return
        # Renamed first: a partly removed folder must not look like a checkpoint.
        remove(scratch_move(self.scratch, folder))


def choose_latest(
    whole: list[Checkpoint], damaged: list[Damaged], save_path: Path
) -> tuple[Checkpoint, list[Damaged]]:
    """The latest checkpoint whose checksums match, and the damaged ones after it.

    Raises:
        CheckpointError: All checkpoints of the latest run are damaged.
    """
    generation = max((c.state.generation for c in whole), default=0)
    generation = max([generation, *(d.generation or 0 for d in damaged)])
    later: list[Damaged] = []
    for checkpoint in reversed([c for c in whole if c.state.generation == generation]):
        damage = checkpoint.find_damage()
        if damage is None:
            return checkpoint, later + [d for d in damaged if _may_be_later(d, checkpoint)]
        later.append(Damaged(checkpoint.folder, damage, generation))
    lines = [f"  `{d.folder}`: {d.reason}" for d in (*later, *damaged)]
    raise CheckpointError(
        "\n".join([f"All checkpoints in `{save_path}` that could be resumed are damaged", *lines]),
        hint="Restore one of them, or start over with `--no-resume-from-checkpoint`",
    )


def _may_be_later(damaged: Damaged, checkpoint: Checkpoint) -> bool:
    """Whether a damaged checkpoint may be later than another, by its name."""
    name, state = damaged.folder.name, checkpoint.state
    if name.isdecimal():
        return int(name) >= state.epoch
    step = name.removeprefix("step-")
    return int(step) > state.step if step.isdecimal() else True


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    """Write and flush every file, then the manifest that makes the folder a checkpoint."""
    write_json(snapshot.config, folder / CONFIG_NAME)
    write_json(asdict(snapshot.state), folder / STATE_NAME)
    # Two threads: one writes while the other computes a checksum.
    with ThreadPoolExecutor(1) as thread:
        moments = thread.submit(write_tensors, snapshot.moments, folder / MOMENTS_NAME)
        weights = write_tensors(snapshot.tensors, folder / WEIGHTS_NAME, {"format": "pt"})
        records = {WEIGHTS_NAME: weights, MOMENTS_NAME: moments.result()}
    for name in (CONFIG_NAME, STATE_NAME):
        file = folder / name
        sync(file)
        records[name] = FileRecord(num_bytes=file.stat().st_size, sha256=hash_file(file))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "generation": snapshot.state.generation,
        "files": {name: records[name].model_dump() for name in FILE_NAMES},
    }
    write_json(manifest, folder / MANIFEST_NAME)
    for path in (folder / MANIFEST_NAME, folder / TRAINER_DIR, folder):
        sync(path)
