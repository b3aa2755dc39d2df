"""Which files hold a verifier's embedding, final norm and head, in a folder or on the hub."""

import re
from dataclasses import dataclass

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.repo_files import RepoFiles

# Other towers and heads of a model, whose embeddings are not the text model's.
_SIDE_PARTS = re.compile(r"(^|\.)(layers|mtp|visual|vision\w*|audio\w*|talker|encoder)\.")


@dataclass(frozen=True)
class PartNames:
    """Names of the tensors that training reads; a tied head has the embedding's name."""

    embedding: str
    norm: str
    head: str


class VerifierFiles(RepoFiles):
    """Files of one verifier; those of the hub are fetched when first asked for.

    Args:
        name_or_path: A folder, or a hub id.
    """

    def __init__(self, name_or_path: str) -> None:
        super().__init__(name_or_path, flag="--verifier-name-or-path")

    def read_vocab_size(self, *, is_tied: bool) -> int:
        """Rows of the embedding, from the header of its file."""
        name = self.find_parts(is_tied=is_tied).embedding
        with self.open(name) as tensors:
            rows: int = tensors.get_slice(name).get_shape()[0]
        return rows

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
        self.check_unlisted(name)
        return SettingsError(
            f"Verifier `{self.name_or_path}` has no tensor `{name}`",
            hint="Pass a causal language model of the Llama, Qwen, Mistral or Gemma kind",
        )
