"""Checkpoints of a run: each is absent or complete, whenever the process is killed."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.errors import CheckpointError, MachineError
from speculators_cli.core.files import (
    TEMPORARY,
    check_free_space,
    locking,
    replacing,
    sync,
    write_json,
)
from speculators_cli.core.models.checkpoint import (
    BEST_LINK,
    MANIFEST_NAME,
    MOMENTS_NAME,
    SCHEMA_VERSION,
    STATE_NAME,
    TRAINER_DIR,
    Checkpoint,
    find_checkpoints,
    hash_file,
    is_ours,
    read_checkpoint,
)
from speculators_cli.core.models.repo_files import CONFIG_NAME, WEIGHTS_NAME

REPLACED = ".replaced-"  # an old checkpoint whose name a new one takes


@dataclass(frozen=True)
class TrainState:
    """Everything of a run's state but tensors."""

    step: int  # optimizer steps done
    epoch: int  # the epoch the next step belongs to
    step_in_epoch: int
    run_id: str
    started_at: float  # seconds since 1970
    global_batch: int  # packed sequences an optimizer step takes over all ranks
    num_ranks: int
    data_hash: str
    vocab_map_hash: str
    settings: dict[str, Any]
    best: dict[str, Any] | None  # name and metrics of the best checkpoint
    num_skipped_steps: int
    metrics: dict[str, float]  # of the last validation

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The state saved in a checkpoint; keys of newer versions are left out."""
        return cls(**{field.name: content[field.name] for field in fields(cls)})


class RunFolder:
    """The save path of a run, locked; only rank 0 has one.

    Args:
        save_path: Holds the checkpoints and the run's own records.
        run_id: Tells this run from earlier ones in the same folder.
        latest: The checkpoint to go on from, if any.
        old: Checkpoints of earlier runs, which go once this run has saved one.
    """

    INDEX_NAME = "data_index.json"

    def __init__(
        self, save_path: Path, run_id: str, latest: Checkpoint | None, old: list[Checkpoint]
    ) -> None:
        self.save_path = save_path
        self.run_id = run_id
        self.latest = latest
        self.old = old

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: every log step and validation."""
        return self.save_path / "metrics.jsonl"

    @property
    def settings_file(self) -> Path:
        """All settings of the run, defaults included."""
        return self.save_path / "settings.json"

    @classmethod
    @contextmanager
    def open(cls, save_path: Path, *, resume: bool, is_restart: bool) -> Iterator["RunFolder"]:
        """Lock a save path, clean up what a killed run left, choose what to go on from.

        Args:
            save_path: Created if missing.
            resume: Go on from the latest checkpoint; else start over beside the old ones.
            is_restart: The launcher started this run again: it resumes itself in any case.

        Raises:
            CheckpointError: Another run holds the folder, or it has foreign checkpoints.
        """
        save_path.mkdir(parents=True, exist_ok=True)

        def in_use(holder: str) -> CheckpointError:
            return CheckpointError(
                f"`{save_path}` is in use by {holder}",
                hint="Wait for that run to end, or choose another `--save-path`",
            )

        with locking(save_path / "run.lock", in_use=in_use) as lock:
            _refuse_foreign(save_path)
            _clean(save_path)
            own_id: str | None = lock.last.get("run_id") if is_restart else None
            found = find_checkpoints(save_path)
            if not resume:
                mine = [c for c in found if own_id is not None and c.state["run_id"] == own_id]
                old = [c for c in found if c not in mine]
            else:
                mine, old = found, []
            latest = mine[-1] if mine else None
            run_id = latest.state["run_id"] if latest else own_id or uuid.uuid4().hex
            lock.write(run_id=run_id)
            yield cls(save_path, run_id, latest, old)

    def save(
        self,
        name: str,
        *,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        trainer_tensors: Mapping[str, Tensor],
        state: TrainState,
    ) -> None:
        """Commit a checkpoint under a name, then drop checkpoints of earlier runs.

        Raises:
            MachineError: The disk is full or fails; what was there before is intact.
        """
        check_free_space(
            self.save_path,
            sum(tensor.nbytes for tensor in (*tensors.values(), *trainer_tensors.values())),
            what="a checkpoint",
            hint="Make room on the disk, then run the same command again to go on",
        )
        temporary = self.save_path / f"{TEMPORARY}{name}"
        folder = self.save_path / name
        try:
            (temporary / TRAINER_DIR).mkdir(parents=True)
            save_file(_contiguous(tensors), temporary / WEIGHTS_NAME, {"format": "pt"})
            save_file(_contiguous(trainer_tensors), temporary / MOMENTS_NAME)
            write_json(config, temporary / CONFIG_NAME)
            write_json(asdict(state), temporary / STATE_NAME)
            _seal(temporary)
            if folder.exists():
                folder.rename(self.save_path / f"{REPLACED}{name}")
            temporary.rename(folder)
            sync(self.save_path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise MachineError(
                f"`{folder}` cannot be saved: {error.strerror}",
                hint="Make room on the disk, then run the same command again to go on",
            ) from None
        shutil.rmtree(self.save_path / f"{REPLACED}{name}", ignore_errors=True)
        self.latest = read_checkpoint(folder)
        for checkpoint in self.old:
            if checkpoint.folder != folder:
                shutil.rmtree(checkpoint.folder, ignore_errors=True)
        self.old = []

    def set_best(self, name: str) -> None:
        """Point `checkpoint_best` at a checkpoint, in one step."""
        link, new = self.save_path / BEST_LINK, self.save_path / f"{TEMPORARY}{BEST_LINK}"
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        new.replace(link)

    def prune(self, keep: int | None) -> None:
        """Drop all checkpoints of this run but the `keep` latest and the best."""
        if keep is None:
            return
        link = self.save_path / BEST_LINK
        best = str(link.readlink()) if link.is_symlink() else None
        found = [c for c in find_checkpoints(self.save_path) if c.state["run_id"] == self.run_id]
        for checkpoint in found[:-keep]:
            if checkpoint.folder.name != best:
                # Renamed first: a folder half removed must not look like a checkpoint.
                doomed = self.save_path / f"{TEMPORARY}{checkpoint.folder.name}"
                checkpoint.folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write how the run ended: torchrun hides the exit code."""
        with replacing(self.save_path / "result.json") as temporary:
            write_json(result, temporary)


def _refuse_foreign(save_path: Path) -> None:
    visible = (path for path in save_path.iterdir() if not path.name.startswith("."))
    for folder in sorted(visible):
        looks_like_one = (folder / CONFIG_NAME).exists() or any(folder.glob("*.safetensors"))
        if folder.is_dir() and looks_like_one and not is_ours(folder):
            raise CheckpointError(
                f"`{folder}` is a checkpoint that `speculators train` did not write",
                hint="Choose another `--save-path`",
            )


def _clean(save_path: Path) -> None:
    """Bring back a checkpoint that was about to be replaced; remove saves that did not commit."""
    for leftover in save_path.glob(f"{REPLACED}*"):
        folder = save_path / leftover.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(leftover)
        else:
            leftover.rename(folder)
    for leftover in save_path.glob(f"{TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _seal(folder: Path) -> None:
    """Flush every file, then write the manifest that makes the folder a checkpoint."""
    names = (CONFIG_NAME, WEIGHTS_NAME, STATE_NAME, MOMENTS_NAME)
    for name in names:
        sync(folder / name)
    files = {
        name: {
            "num_bytes": (folder / name).stat().st_size,
            "sha256": hash_file(folder / name),
        }
        for name in names
    }
    write_json({"schema_version": SCHEMA_VERSION, "files": files}, folder / MANIFEST_NAME)
    for path in (folder / MANIFEST_NAME, folder / TRAINER_DIR, folder):
        sync(path)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
