"""Checkpoint: a committed folder of weights, config and trainer state, as anyone reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config import PRODUCER
from speculators_cli.core.models.repo_files import CONFIG_NAME, WEIGHTS_NAME

BEST_LINK = "checkpoint_best"
TRAINER_DIR = "trainer"
STATE_NAME = f"{TRAINER_DIR}/state.json"
MOMENTS_NAME = f"{TRAINER_DIR}/optimizer.safetensors"
MANIFEST_NAME = f"{TRAINER_DIR}/manifest.json"  # written last: without it nothing was saved
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest says that it is complete."""

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of its config.json."""
        return _read_json(self.folder / CONFIG_NAME)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The trainer's state beside its tensors."""
        return _read_json(self.folder / STATE_NAME)

    def read_tensors(self) -> dict[str, Tensor]:
        """Weights of the draft, on the CPU, float32."""
        return load_file(self.folder / WEIGHTS_NAME)

    def read_trainer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state, on the CPU, float32."""
        return load_file(self.folder / MOMENTS_NAME)

    def verify(self) -> None:
        """Read every byte and compare with the manifest.

        Raises:
            CheckpointError: A file is not as it was saved.
        """
        for name, saved in self.manifest["files"].items():
            if hash_file(self.folder / name) != saved["sha256"]:
                raise CheckpointError(
                    f"`{self.folder / name}` is not as it was saved",
                    hint=f"Remove `{self.folder}`; the run goes on from the checkpoint before",
                )


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None if it is not a complete one.

    Raises:
        CheckpointError: A newer version of this program wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
        version = manifest["schema_version"]
        sizes = {name: saved["num_bytes"] for name, saved in manifest["files"].items()}
        is_whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"`{folder}` has checkpoint schema {version}, this version reads up to "
            f"{SCHEMA_VERSION}",
            hint="Install the version of `speculators-cli` that wrote it, or a newer one",
        )
    return Checkpoint(folder, manifest) if is_whole else None


def find_checkpoints(save_path: Path) -> list[Checkpoint]:
    """Complete checkpoints of a save path: older runs first, then by step."""
    if not save_path.is_dir():
        return []
    folders = [f for f in save_path.iterdir() if f.is_dir() and not f.is_symlink()]
    found = [read_checkpoint(f) for f in folders if not f.name.startswith(".")]
    return sorted((c for c in found if c is not None), key=_age)


def is_ours(folder: Path) -> bool:
    """Whether this program wrote the checkpoint in a folder."""
    try:
        producer = _read_json(folder / CONFIG_NAME).get("producer")
    except (OSError, ValueError):
        return False
    return isinstance(producer, dict) and producer.get("name") == PRODUCER


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _age(checkpoint: Checkpoint) -> tuple[float, int, int]:
    state = checkpoint.state
    return (state["started_at"], state["step"], state["epoch"])


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object")
    return content
