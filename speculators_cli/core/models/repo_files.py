"""RepoFiles: files of a model, in a folder or on the hub."""

import json
from functools import cached_property
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from speculators_cli.core.errors import MachineError, SettingsError, SpeculatorsError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"


class RepoFiles:
    """Files of one model; those of the hub are fetched when first asked for.

    Args:
        name_or_path: A folder, or a hub id.
        flag: The flag that named it.
    """

    def __init__(self, name_or_path: str, *, flag: str) -> None:
        self.name_or_path = name_or_path
        self.flag = flag
        self.folder = Path(name_or_path)
        self.is_local = self.folder.exists()
        looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
        if not self.is_local and looks_like_path:
            raise SettingsError(
                f"`{flag}`: the folder `{name_or_path}` does not exist",
                hint="Name a folder that holds `config.json`, or a hub id such as `Qwen/Qwen3-8B`",
            )

    def file(self, name: str) -> Path:
        """Path of the file called `name`.

        Raises:
            SettingsError: The folder lacks it.
            MachineError: The hub cannot give it.
        """
        found = self.find(name)
        if found is None:
            raise SettingsError(
                f"`{self.flag}`: `{self.name_or_path}` has no `{name}`",
                hint="Name a folder or hub id that holds `config.json` and `.safetensors` weights",
            )
        return found

    def find(self, name: str) -> Path | None:
        """Path of the file called `name`, or None if the model has none.

        Raises:
            SettingsError: Neither a folder nor a hub id.
            MachineError: The hub cannot give it.
        """
        if self.is_local:
            file = self.folder / name
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(self.name_or_path, name))
        except LocalEntryNotFoundError as error:
            raise self._hub_error(error) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise self._hub_error(error) from None

    def _hub_error(self, error: Exception) -> SpeculatorsError:
        name = self.name_or_path
        if isinstance(error, HFValidationError):
            return SettingsError(
                f"`{self.flag}`: `{name}` is neither a folder nor a hub id",
                hint="Name a folder that holds `config.json`, or a hub id such as `Qwen/Qwen3-8B`",
            )
        if isinstance(error, GatedRepoError):
            return MachineError(
                f"The hub does not let you read `{name}`: access is gated",
                hint=f"Ask for access on the page of `{name}`, then run `hf auth login`",
            )
        if isinstance(error, RepositoryNotFoundError):
            return MachineError(
                f"The hub has no `{name}`, or you may not see it",
                hint="Check the spelling, run `hf auth login`, or name a local folder",
            )
        return MachineError(
            f"`{name}` is no local folder, and the hub cannot be reached",
            hint="Check the spelling and the network, or name a local folder",
        )

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Which file holds each tensor, from the index or the single weights file."""
        index = self.find(INDEX_NAME)
        if index is not None:
            weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            return weight_map
        with _open(self.file(WEIGHTS_NAME)) as tensors:
            return dict.fromkeys(tensors.keys(), WEIGHTS_NAME)

    def open(self, name: str) -> safe_open:
        """Open the file that holds the tensor `name`.

        Raises:
            MachineError: The file is damaged, or the hub cannot give it.
        """
        return _open(self.file(self.weight_map[name]))


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MachineError(
            f"`{file}` is damaged: {error}", hint="Download the file again"
        ) from None
