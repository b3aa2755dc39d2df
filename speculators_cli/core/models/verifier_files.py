"""Which files hold a verifier's embedding, final norm and head, in a folder or on the hub."""

import json
import re
from dataclasses import dataclass
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

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
# Other towers and heads of a model, whose embeddings are not the text model's.
_SIDE_PARTS = re.compile(r"(^|\.)(layers|mtp|visual|vision\w*|audio\w*|talker|encoder)\.")


@dataclass(frozen=True)
class PartNames:
    """Names of the tensors that training reads; a tied head has the embedding's name."""

    embedding: str
    norm: str
    head: str


class VerifierFiles:
    """Files of one verifier; those of the hub are fetched when first asked for.

    Args:
        name_or_path: A folder, or a hub id.
    """

    def __init__(self, name_or_path: str) -> None:
        self.name_or_path = name_or_path
        self.folder = Path(name_or_path)
        self.is_local = self.folder.exists()
        looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
        if not self.is_local and looks_like_path:
            raise SettingsError(
                f"`--verifier-name-or-path`: the folder `{name_or_path}` does not exist",
                hint="Name a folder that holds `config.json`, or a hub id such as `Qwen/Qwen3-8B`",
            )

    def file(self, name: str) -> Path:
        """Path of the file called `name`.

        Raises:
            SettingsError: The folder lacks it.
            MachineError: The hub cannot give it.
        """
        found = self._find(name)
        if found is None:
            raise SettingsError(
                f"`--verifier-name-or-path`: `{self.name_or_path}` has no `{name}`",
                hint="Name a folder or hub id that holds `config.json` and `.safetensors` weights",
            )
        return found

    def _find(self, name: str) -> Path | None:
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
                f"`--verifier-name-or-path`: `{name}` is neither a folder nor a hub id",
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
        index = self._find(INDEX_NAME)
        if index is not None:
            weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            return weight_map
        with _open(self.file(WEIGHTS_NAME)) as tensors:
            return dict.fromkeys(tensors.keys(), WEIGHTS_NAME)

    def read_vocab_size(self, *, is_tied: bool) -> int:
        """Rows of the embedding, from the header of its file."""
        name = self.find_parts(is_tied=is_tied).embedding
        with self.open(name) as tensors:
            rows: int = tensors.get_slice(name).get_shape()[0]
        return rows

    def open(self, name: str) -> safe_open:
        """Open the file that holds the tensor `name`.

        Raises:
            MachineError: The file is damaged, or the hub cannot give it.
        """
        return _open(self.file(self.weight_map[name]))

    def find_parts(self, *, is_tied: bool) -> PartNames:
        """Find embedding, final norm and head among the verifier's tensors, under any prefix.

        Args:
            is_tied: Whether the config says that the head is the embedding.

        Raises:
            SettingsError: One is missing, or the head is quantised.
        """
        names = [name for name in self.weight_map if not _SIDE_PARTS.search(name)]
        embeddings = [name for name in names if name.endswith("embed_tokens.weight")]
        embedding = min(embeddings, key=len, default=None)
        if embedding is None:
            raise self._missing("embed_tokens.weight")
        norm = embedding.removesuffix("embed_tokens.weight") + "norm.weight"
        if norm not in self.weight_map:
            raise self._missing(norm)
        quantised = [name for name in names if re.search(r"(^|\.)lm_head\.(?!weight$|bias$)", name)]
        if quantised:
            raise SettingsError(
                f"The head of verifier `{self.name_or_path}` is quantised: it has `{quantised[0]}`",
                hint="Pass the verifier before quantisation: its head gives the training targets",
            )
        head = next((name for name in names if name.endswith("lm_head.weight")), None)
        if head is None and not is_tied:
            raise self._missing("lm_head.weight")
        return PartNames(embedding, norm, head or embedding)

    def _missing(self, name: str) -> SettingsError:
        return SettingsError(
            f"Verifier `{self.name_or_path}` has no tensor `{name}`",
            hint="Pass a causal language model of the Llama, Qwen, Mistral or Gemma kind",
        )


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MachineError(
            f"`{file}` is damaged: {error}", hint="Download the file again"
        ) from None
