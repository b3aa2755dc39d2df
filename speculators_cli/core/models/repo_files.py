"""RepoFiles: the files of a model, in a folder or on the hub."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
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
from speculators_cli.core.files import read_parts
from speculators_cli.core.models.weights_file import open_weights
from speculators_cli.core.reading import (
    DOWNLOAD_AGAIN,
    Tensors,
    UnreadableError,
    opening,
    read_json_object,
    refusing,
)

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
WEIGHTS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
# Errors of a file system where the hub's cache cannot be written.
CANNOT_STORE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}
FOLDER_HINT = "Pass a folder with `config.json`, or a hub id such as `Qwen/Qwen3-8B`"


class RepoFiles:
    """Files of one model; those on the hub are downloaded on first use.

    Args:
        name_or_path: A folder, or a hub id.
        flag: The flag it was passed with.
        error: Class of the errors raised for unusable files.
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
                hint=f"Pass the model's folder `{self.folder.parent}`",
            )
        looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
        if not self.is_local and looks_like_path:
            raise SettingsError(
                f"`{flag}`: the folder `{name_or_path}` does not exist", hint=FOLDER_HINT
            )

    def file(self, name: str) -> Path:
        """Return the path of the file `name`.

        Raises:
            SpeculatorsError: The model does not have it.
            MachineError: The download fails.
        """
        found = self.find(name)
        if found is None:
            raise self.error(
                f"`{self.flag}`: `{self.name_or_path}` has no `{name}`", hint=FOLDER_HINT
            )
        return found

    def find(self, name: str) -> Path | None:
        """Return the path of the file `name`, or None if the model has none.

        In a folder, the path may not be a regular file, such as a broken link: reading it checks.

        Raises:
            SettingsError: Neither a folder nor a hub id.
            MachineError: The download fails.
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
        """Return the object in the JSON file `name`.

        Raises:
            SpeculatorsError: The model does not have it, or it cannot be read.
            MachineError: The download fails.
        """
        file = self.file(name)
        with self._refusing():
            return read_json_object(file)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Return the file of each tensor, from the index or the single weights file.

        Raises:
            SpeculatorsError: There are no weights, or they cannot be read.
            MachineError: The download fails.
        """
        index = self._index
        if index is not None:
            return self._read_index(index)
        with self._refusing(), open_weights(self.file(self._single_name)) as tensors:
            return dict.fromkeys(tensors.names(), self._single_name)

    @contextmanager
    def open(self, name: str) -> Iterator[Tensors]:
        """Open the file of the tensor `name`, which must be in `weight_map`.

        Raises:
            SpeculatorsError: The file is missing or damaged, or lacks the tensor.
            MachineError: The download fails.
        """
        with self._refusing():
            file = self._find_listed(self.weight_map[name], name)
            with open_weights(file) as tensors:
                if name not in tensors:
                    raise self._stale(f"lists `{name}` in `{file.name}`, which lacks it", file.name)
                yield tensors

    def read_tensors(self) -> dict[str, Tensor]:
        """Read every tensor of every weights file.

        Raises:
            SpeculatorsError: A file is missing or damaged, or two files have the same tensor.
            MachineError: The download fails.
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

    def hash_parts(self) -> str:
        """Return a hash of config.json, and of sizes and parts of the weights files.

        Raises:
            SpeculatorsError: There are no weights.
            MachineError: The download fails.
        """
        config = self.read_json(CONFIG_NAME)
        digest = sha256(json.dumps(config, sort_keys=True).encode(errors="surrogateescape"))
        for name in sorted(set(self.weight_map.values())):
            with self._refusing(), opening(self._find_listed(name, None)) as descriptor:
                digest.update(f"{name}\0{os.fstat(descriptor).st_size}\0".encode())
                digest.update(read_parts(descriptor))
        return digest.hexdigest()

    def check_unlisted(self, ending: str) -> None:
        """Check that no file of a folder has a tensor that is missing in the index.

        Raises:
            SpeculatorsError: A file has one whose name ends with `ending`.
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
        """Path of the index of the weights files; None if there is a single file."""
        if (index := self.find(INDEX_NAME)) is not None or self.find(WEIGHTS_NAME) is not None:
            return index
        return self.find(PICKLE_INDEX_NAME)

    @cached_property
    def _single_name(self) -> str:
        """Return the name of the single weights file, where there is no index."""
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
                        f"lists `{name}` in `{file_name}`, which is outside of its folder",
                        hint="Download the model from a trusted source",
                    )
            return weight_map

    def _find_listed(self, file_name: str, tensor: str | None) -> Path:
        """Return the path of a weights file listed in the index."""
        found = self.find(file_name)
        if found is None:
            what = f"lists `{tensor}` in `{file_name}`" if tensor else f"lists `{file_name}`"
            raise self._stale(f"{what}, which is missing", file_name)
        return found

    def _stale(self, reason: str, file_name: str) -> UnreadableError:
        assert self._index is not None, "a single file is not listed"
        if self.is_local and (self.folder / WEIGHTS_NAME).is_file():
            hint = f"Remove the index if `{WEIGHTS_NAME}` has all weights, or download both again"
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
                f"Access to `{name}` on the hub is gated",
                hint=f"Request access at https://huggingface.co/{name}, then run `hf auth login`",
            )
        if isinstance(error, RepositoryNotFoundError):
            return MachineError(
                f"`{name}` does not exist on the hub, or is private",
                hint="Check the spelling, run `hf auth login`, or pass a local folder",
            )
        if isinstance(error, OSError) and error.errno in CANNOT_STORE:
            return MachineError(
                f"`{name}` cannot be stored in `{constants.HF_HUB_CACHE}`: {error.strerror}",
                hint="Set `HF_HOME` to a folder that you may write to, or pass a local folder",
            )
        if constants.HF_HUB_OFFLINE:
            return MachineError(
                f"`{name}` is not a local folder, and the hub cannot be reached: `HF_HUB_OFFLINE` "
                "is set, and the cache is incomplete",
                hint="Unset `HF_HUB_OFFLINE`, or pass a local folder",
            )
        return MachineError(
            f"`{name}` is not a local folder, and the hub cannot be reached",
            hint="Check the spelling and the network, or pass a local folder",
        )


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:  # a name too long for a path, or a parent folder without permission
        return False


def _is_inside(file_name: object) -> bool:
    """Whether an index may list this file name: a path in its folder or below it."""
    if not isinstance(file_name, str) or "\0" in file_name or "\\" in file_name:
        return False
    path = PurePosixPath(file_name)
    return path.name.strip() != "" and not path.is_absolute() and ".." not in path.parts
