"""Checkpoint: a committed folder of weights, config and trainer state, and how it is read.

The manifest, written last, has the size and checksum of every file, and the run of the checkpoint.
A folder without a complete manifest is not a checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import PRODUCER
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.repo_files import CONFIG_NAME, WEIGHTS_NAME
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.reading import UnreadableError, open_safetensors, read_json_object

BEST_LINK = "checkpoint_best"
TRAINER_DIR = "trainer"
STATE_NAME = f"{TRAINER_DIR}/state.json"
MOMENTS_NAME = f"{TRAINER_DIR}/optimizer.safetensors"
MANIFEST_NAME = f"{TRAINER_DIR}/manifest.json"  # written last: without it nothing was saved
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME, STATE_NAME, MOMENTS_NAME)
SCHEMA_VERSION = 1


class FileRecord(BaseModel):
    """Size and checksum of a saved file."""

    model_config = ConfigDict(strict=True, frozen=True)

    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What makes a folder a checkpoint."""

    model_config = ConfigDict(strict=True, frozen=True)

    schema_version: Annotated[int, Field(ge=1)]
    files: dict[str, FileRecord]
    generation: Annotated[int, Field(ge=0)] | None = None  # of the run, as in the trainer state


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete by its manifest; checksums are not verified."""

    folder: Path
    manifest: Manifest
    state: TrainState

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of its config.json."""
        return read_json_object(self.folder / CONFIG_NAME)

    def read_tensors(self) -> dict[str, Tensor]:
        """Weights of the draft, on the CPU, float32."""
        return _read_all(self.folder / WEIGHTS_NAME)

    def read_trainer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state, on the CPU, float32."""
        return _read_all(self.folder / MOMENTS_NAME)

    def find_damage(self) -> str | None:
        """Read every byte and compare with the manifest; returns what is wrong, if anything."""
        for name, saved in self.manifest.files.items():
            try:
                found = hash_file(self.folder / name)
            except OSError as error:
                return f"`{name}` cannot be read: {error.strerror}"
            if found != saved.sha256:
                return f"`{name}` is corrupted (checksum mismatch)"
        return None

    def verify(self) -> None:
        """Read every byte and compare with the manifest.

        Raises:
            CheckpointError: A file is corrupted.
        """
        damage = self.find_damage()
        if damage is not None:
            raise Damaged(self.folder, damage).to_error()


@dataclass(frozen=True)
class Damaged:
    """A checkpoint of this package that cannot be used."""

    folder: Path
    reason: str  # a sentence about the folder's files
    generation: int | None = None  # of the run, if it can be read

    def to_error(self) -> CheckpointError:
        """The error for a command whose argument it is."""
        return CheckpointError(
            f"`{self.folder}` is damaged: {self.reason}",
            hint="Choose another checkpoint of the run",
        )


def inspect_checkpoint(folder: Path) -> Checkpoint | Damaged | None:
    """The checkpoint in a folder, complete or damaged; None if this package wrote none there.

    Raises:
        CheckpointError: A newer version of this program wrote it.
    """
    if not is_ours(folder):
        return None
    generation = None
    try:
        manifest = _read_manifest(folder)
        generation = manifest.generation
        damage = next(_find_missing(folder, manifest), None)
        if damage is None:
            return Checkpoint(folder, manifest, read_state(folder))
    except UnreadableError as error:
        damage = f"`{error.file.relative_to(folder).as_posix()}` {error.reason}"
    return Damaged(folder, damage, generation)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None if it is not a complete one.

    Raises:
        CheckpointError: A newer version of this program wrote it.
    """
    found = inspect_checkpoint(folder)
    return found if isinstance(found, Checkpoint) else None


def list_checkpoints(save_path: Path) -> tuple[list[Checkpoint], list[Damaged]]:
    """Complete checkpoints of a save path, from the first to the latest, and damaged ones.

    Raises:
        CheckpointError: A newer version of this program wrote one.
    """
    whole, damaged = [], []
    if save_path.is_dir():
        folders = sorted(f for f in save_path.iterdir() if f.is_dir() and not f.is_symlink())
        for folder in folders:
            found = None if folder.name.startswith(".") else inspect_checkpoint(folder)
            if isinstance(found, Checkpoint):
                whole.append(found)
            elif found is not None:
                damaged.append(found)
    return sorted(whole, key=_place), damaged


def find_checkpoints(save_path: Path) -> list[Checkpoint]:
    """Complete checkpoints of a save path, from the first to the latest."""
    return list_checkpoints(save_path)[0]


def is_ours(folder: Path) -> bool:
    """Whether the manifest, state or config in a folder prove that this program wrote them."""
    manifest = _read_or_empty(folder / MANIFEST_NAME)
    if isinstance(manifest.get("files"), dict) and set(manifest["files"]) == set(FILE_NAMES):
        return True
    if {"run_id", "global_batch", "vocab_map_hash"} <= set(_read_or_empty(folder / STATE_NAME)):
        return True
    producer = _read_or_empty(folder / CONFIG_NAME).get("producer")
    return isinstance(producer, dict) and producer.get("name") == PRODUCER


def find_foreign(folder: Path) -> Path | None:
    """A path in the folder of a checkpoint that is not part of it."""
    own = {folder / name for name in (*FILE_NAMES, MANIFEST_NAME)}
    for path in sorted(folder.rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        if path != folder / TRAINER_DIR and not (path in own and is_plain):
            return path
    return None


def read_state(folder: Path) -> TrainState:
    """The trainer's state in the folder of a checkpoint.

    Raises:
        UnreadableError: It is not the state of a run.
    """
    file = folder / STATE_NAME
    content = read_json_object(file)
    try:
        return TrainState.from_json(content)
    except ValueError as error:
        raise UnreadableError(file, f"cannot be used: {error}", hint="") from None


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST_NAME
    content = read_json_object(file)
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"`{folder}` has checkpoint schema {version}, this version reads up to "
            f"{SCHEMA_VERSION}",
            hint="Install the version of `speculators-cli` that wrote it, or a newer one",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"cannot be used: `{place}`: {first['msg']}"
        raise UnreadableError(file, reason, hint="") from None
    if set(manifest.files) != set(FILE_NAMES):
        raise UnreadableError(file, "cannot be used: it lists other files", hint="")
    return manifest


def _find_missing(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, saved in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            yield f"`{name}` cannot be read: {error.strerror}"
        else:
            if num_bytes != saved.num_bytes:
                yield f"`{name}` has {num_bytes:,} bytes, {saved.num_bytes:,} were saved"


def _place(checkpoint: Checkpoint) -> tuple[int, float, int, int]:
    """Sort key of the checkpoints of a save path: by run, then by step."""
    state = checkpoint.state
    # Clocks can go back: only runs of earlier versions are ordered by their start.
    return (
        state.generation,
        0.0 if state.generation else state.started_at,
        state.step,
        state.epoch,
    )


def _read_or_empty(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except UnreadableError:
        return {}


def _read_all(file: Path) -> dict[str, Tensor]:
    with open_safetensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.names()}
