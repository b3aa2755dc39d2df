"""RepoFiles: files of a model, in a folder or on the hub."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import Tensor

from speculators_cli.core.errors import MachineError, SettingsError, SpeculatorsError
from speculators_cli.core.models.weights_file import open_weights
from speculators_cli.core.reading import (
    DOWNLOAD_AGAIN,
    Tensors,
    UnreadableError,
    read_json_object,
    refusing,
)

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
WEIGHTS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
# What a file system reports where the cache of the hub's files cannot be written.
CANNOT_STORE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}
FOLDER_HINT = "Pass a folder that holds `config.json`, or a hub id such as `Qwen/Qwen3-8B`"


class RepoFiles:
    """Files of one model; those of the hub are fetched when first asked for.

    Args:
        name_or_path: A folder, or a hub id.
        flag: The flag that named it.
        error: What a file of it that cannot be used is raised as.
    """

    def __init__(
        self, name_or_path: str, *, flag: str, error: type[SpeculatorsError] = SettingsError
    ) -> None:
        self.name_or_path = name_or_path
        self.flag = flag
        self.error = error
        self.folder = Path(name_or_path)
        self.is_local = _exists(self.folder) and name_or_path != ""
        if self.is_local and not self.folder.is_dir():
            raise SettingsError(
                f"`{flag}`: `{name_or_path}` is not a folder",
                hint=f"Pass the folder of the model: `{self.folder.parent}`",
            )
        looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
        if not self.is_local and looks_like_path:
            raise SettingsError(
                f"`{flag}`: the folder `{name_or_path}` does not exist", hint=FOLDER_HINT
            )

    def file(self, name: str) -> Path:
        """Path of the file called `name`.

        Raises:
            SpeculatorsError: The model lacks it.
            MachineError: The hub cannot give it.
        """
        found = self.find(name)
        if found is None:
            raise self.error(
                f"`{self.flag}`: `{self.name_or_path}` has no `{name}`", hint=FOLDER_HINT
            )
        return found

    def find(self, name: str) -> Path | None:
        """Path of the file called `name`, or None if the model has none.

        What lies there in a folder may be no file, such as a link to nothing: reading tells.

        Raises:
            SettingsError: Neither a folder nor a hub id.
            MachineError: The hub cannot give it.
        """
        if self.is_local:
            file = self.folder / name
            return file if os.path.lexists(file) else None
        try:
            return Path(hf_hub_download(self.name_or_path, name))
        except LocalEntryNotFoundError as error:
            raise self._hub_error(error) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise self._hub_error(error) from None

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in the JSON file called `name`.

        Raises:
            SpeculatorsError: The model lacks it, or it cannot be read.
            MachineError: The hub cannot give it.
        """
        file = self.file(name)
        with self._refusing():
            return read_json_object(file)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Which file holds each tensor, from the index or the single weights file.

        Raises:
            SpeculatorsError: There are no weights, or they cannot be read.
            MachineError: The hub cannot give them.
        """
        index = self._index
        if index is not None:
            return self._read_index(index)
        with self._refusing(), open_weights(self.file(self._single_name)) as tensors:
            return dict.fromkeys(tensors.names(), self._single_name)

    @contextmanager
    def open(self, name: str) -> Iterator[Tensors]:
        """Open the file that holds the tensor `name`, which must be one of `weight_map`.

        Raises:
            SpeculatorsError: The file is missing or damaged, or does not hold the tensor.
            MachineError: The hub cannot give it.
        """
        with self._refusing():
            file = self._find_listed(self.weight_map[name], name)
            with open_weights(file) as tensors:
                if name not in tensors:
                    raise self._stale(f"lists `{name}` in `{file.name}`, which lacks it", file.name)
                yield tensors

    def read_tensors(self) -> dict[str, Tensor]:
        """Every tensor of every weights file.

        Raises:
            SpeculatorsError: A file is missing or damaged, or two hold the same tensor.
            MachineError: The hub cannot give them.
        """
        names = sorted(set(self.weight_map.values()))
        tensors: dict[str, Tensor] = {}
        found_in: dict[str, str] = {}
        for file_name in names:
            with self._refusing(), open_weights(self._find_listed(file_name, None)) as content:
                for name in content.names():
                    if name in tensors:
                        raise UnreadableError(
                            content.file,
                            f"holds `{name}`, as `{found_in[name]}` does",
                            hint="Download both files again",
                        )
                    tensors[name], found_in[name] = content.get_tensor(name), file_name
        return tensors

    def check_unlisted(self, ending: str) -> None:
        """Check that no file of a folder holds a tensor that the index should list but does not.

        Raises:
            SpeculatorsError: One does, whose name ends so.
        """
        if not self.is_local or self._index is None:
            return
        suffixes = {Path(name).suffix for name in self.weight_map.values()}
        for file in sorted(x for x in self.folder.iterdir() if x.suffix in suffixes):
            with self._refusing(), open_weights(file) as tensors:
                for name in tensors.names():
                    if name.endswith(ending) and name not in self.weight_map:
                        raise self._stale(f"does not list `{name}` of `{file.name}`", file.name)

    @cached_property
    def _index(self) -> Path | None:
        """The index that says which file holds each tensor; None: a single file does."""
        if (index := self.find(INDEX_NAME)) is not None or self.find(WEIGHTS_NAME) is not None:
            return index
        return self.find(PICKLE_INDEX_NAME)

    @cached_property
    def _single_name(self) -> str:
        """The file that holds all tensors where there is no index."""
        for name in (WEIGHTS_NAME, PICKLE_NAME):
            if self.find(name) is not None:
                return name
        found = ""
        if self.is_local:
            others = (x for x in self.folder.iterdir() if x.suffix in WEIGHTS_SUFFIXES)
            if other := min(others, default=None):
                found = f"; found `{other.name}`"
        raise self.error(
            f"`{self.flag}`: `{self.name_or_path}` has neither `{WEIGHTS_NAME}` nor `{INDEX_NAME}` "
            f"nor `{PICKLE_NAME}`{found}",
            hint="Download the weights as transformers writes them, or convert them with its "
            "`save_pretrained`",
        )

    def _read_index(self, index: Path) -> dict[str, str]:
        with self._refusing():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UnreadableError(
                    index, "has no `weight_map` that lists tensors", hint=DOWNLOAD_AGAIN
                )
            for name, file_name in weight_map.items():
                if not _is_inside(file_name):
                    raise UnreadableError(
                        index,
                        f"lists `{name}` in `{file_name}`, which is no file of its own folder",
                        hint="Download it again from a source that you trust",
                    )
            return weight_map

    def _find_listed(self, file_name: str, tensor: str | None) -> Path:
        """A weights file that the index lists."""
        found = self.find(file_name)
        if found is None:
            what = f"lists `{tensor}` in `{file_name}`" if tensor else f"lists `{file_name}`"
            raise self._stale(f"{what}, which is missing", file_name)
        return found

    def _stale(self, reason: str, file_name: str) -> UnreadableError:
        assert self._index is not None, "a single file is not listed"
        if self.is_local and (self.folder / WEIGHTS_NAME).is_file():
            hint = f"Remove the index if `{WEIGHTS_NAME}` holds all weights, or download both again"
        else:
            hint = f"Download `{file_name}` and the index again"
        return UnreadableError(self._index, reason, hint=hint)

    def _refusing(self) -> Any:
        return refusing(self.error, flag=self.flag)

    def _hub_error(self, error: Exception) -> SpeculatorsError:
        name = self.name_or_path
        if isinstance(error, HFValidationError):
            return SettingsError(
                f"`{self.flag}`: `{name}` is neither a folder nor a hub id", hint=FOLDER_HINT
            )
        if isinstance(error, GatedRepoError):
            return MachineError(
                f"The hub does not let you read `{name}`: access is gated",
                hint=f"Request access at https://huggingface.co/{name}, then run `hf auth login`",
            )
        if isinstance(error, RepositoryNotFoundError):
            return MachineError(
                f"The hub has no `{name}`, or you may not see it",
                hint="Check the spelling, run `hf auth login`, or pass a local folder",
            )
        if isinstance(error, OSError) and error.errno in CANNOT_STORE:
            return MachineError(
                f"`{name}` cannot be stored in `{constants.HF_HUB_CACHE}`: {error.strerror}",
                hint="Set `HF_HOME` to a folder that you may write to, or pass a local folder",
            )
        if constants.HF_HUB_OFFLINE:
            return MachineError(
                f"`{name}` is no local folder, and the hub cannot be reached: `HF_HUB_OFFLINE` is "
                "set, and the cache lacks a file of it",
                hint="Unset `HF_HUB_OFFLINE`, or pass a local folder",
            )
        return MachineError(
            f"`{name}` is no local folder, and the hub cannot be reached",
            hint="Check the spelling and the network, or pass a local folder",
        )


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:  # a name too long for a path, or a folder above that may not be entered
        return False


def _is_inside(file_name: object) -> bool:
    """Whether an index may list a file of this name: one in its folder or below it."""
    if not isinstance(file_name, str) or "\0" in file_name or "\\" in file_name:
        return False
    path = PurePosixPath(file_name)
    return path.name.strip() != "" and not path.is_absolute() and ".." not in path.parts
