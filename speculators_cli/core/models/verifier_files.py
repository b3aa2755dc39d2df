"""Files and names of a verifier's embedding, final norm and LM head, in a folder or on the hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.repo_files import RepoFiles

# Other towers and heads of a model, whose embeddings are not the text model's.
_SIDE_PARTS = re.compile(
    r"(^|\.)(layers|mtp|visual|vision\w*|audio\w*|speech\w*|talker\w*|code_predictor|encoder"
    r"|qformer|vqmodel|vq_model|code2wav|token2wav)\."
)
# Names of modules in files, the most common first.
_EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embeddings", "tok_embeddings", "embed_in"),
    *("embedding", "embed"),
)
_NORMS = (
    "norm", "final_layernorm", "norm_f", "ln_f", "embedding_norm", "final_layer_norm", "final_norm"
)  # fmt: skip
_HEADS = ("lm_head", "embed_out", "output_projection", "output", "unembed", "head")
# Suffixes of the tensor of a weight; all but the first are of a quantised one.
_WEIGHT_ENDINGS = (".weight", ".weight_packed", ".qweight", ".weight_blocks", ".blocks")


@dataclass(frozen=True)
class PartNames:
    """Names of modules, or of their weights in files; a tied LM head has the embedding's name."""

    embedding: str
    norm: str | None  # None: the norm has no weights
    head: str


class VerifierFiles(RepoFiles):
    """Files of one verifier; those on the hub are downloaded on first use.

    Args:
        name_or_path: A folder, or a hub id.
    """

    def __init__(self, name_or_path: str) -> None:
        super().__init__(name_or_path, flag="--verifier-name-or-path")

    def read_vocab_size(self, modules: PartNames | None = None) -> int:
        """Read the number of rows of the embedding from the header of its file.

        Args:
            modules: Names of the parts in the family's own model.

        Raises:
            SettingsError: There is no embedding.
        """
        name = self.find_stored(self.find_embedding(modules))
        with self.open(name) as tensors:
            rows: int = tensors.get_slice(name).get_shape()[0]
        return rows

    def find_parts(self, *, is_tied: bool, modules: PartNames | None = None) -> PartNames:
        """Find embedding, final norm and LM head among the verifier's tensors, under any prefix.

        Args:
            is_tied: Whether the LM head is the embedding, even if the files have another.
            modules: Names of the parts in the family's own model.

        Raises:
            SettingsError: A part is missing.
        """
        embedding = self.find_embedding(modules)
        head = None if is_tied else self.find_head(modules)
        if head is None and not is_tied:
            raise self._missing(f"{modules.head if modules else 'lm_head'}.weight")
        return PartNames(embedding, self._find_norm(embedding, modules), head or embedding)

    def find_embedding(self, modules: PartNames | None = None) -> str:
        """Return the name of the embedding's weight.

        Raises:
            SettingsError: There is none.
        """
        own = () if modules is None else (modules.embedding, modules.embedding.split(".")[-1])
        found = self._find((*own, *_EMBEDDINGS))
        if found is None:
            raise self._missing("embed_tokens.weight")
        return found

    def find_head(self, modules: PartNames | None = None) -> str | None:
        """Return the name of the LM head's weight, or None if the files have none."""
        own = () if modules is None else (modules.head,)
        return self._find((*own, *_HEADS))

    def find_stored(self, name: str) -> str:
        """Return the stored name of a weight, which may be quantised."""
        stem = name.removesuffix(".weight")
        stored = (stem + ending for ending in _WEIGHT_ENDINGS)
        return next((x for x in stored if x in self.weight_map), name)

    @cached_property
    def _stems(self) -> frozenset[str]:
        """Names of the text model's modules that have a weight."""
        return frozenset(
            name.removesuffix(ending)
            for name in self.weight_map
            for ending in _WEIGHT_ENDINGS
            if name.endswith(ending) and not _SIDE_PARTS.search(name)
        )

    def _find(self, modules: Iterable[str]) -> str | None:
        """Return the weight of the first of these modules that the text model has."""
        for module in modules:
            found = [s for s in self._stems if s == module or s.endswith(f".{module}")]
            if found:
                return min(found, key=lambda s: (len(s), s)) + ".weight"
        return None

    def _find_norm(self, embedding: str, modules: PartNames | None) -> str | None:
        if modules is not None and modules.norm is None:
            return None
        prefix = embedding.removesuffix(".weight").rpartition(".")[0]
        names = [f"{prefix}.{norm}".removeprefix(".") for norm in _NORMS]
        if modules is not None:
            assert modules.norm is not None, "returned above"
            names = [modules.norm, self._beside(embedding, modules.embedding, modules.norm), *names]
        found = (f"{name}.weight" for name in names)
        norm = next((name for name in found if name in self.weight_map), None)
        if norm is None:
            raise self._missing(names[-len(_NORMS)] + ".weight")
        return norm

    @staticmethod
    def _beside(stored: str, embedding: str, norm: str) -> str:
        """Return the norm's name under the prefix of the stored embedding."""
        parts, norm_parts = embedding.split("."), norm.split(".")
        pairs = zip(parts, norm_parts, strict=False)
        num_shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        own = ".".join(parts[num_shared:])
        prefix = stored.removesuffix(".weight").removesuffix(own)
        return prefix + ".".join(norm_parts[num_shared:])

    def _missing(self, name: str) -> SettingsError:
        self.check_unlisted(name)
        return SettingsError(
            f"Verifier `{self.name_or_path}` has no tensor `{name}`",
            hint="Pass a causal language model with complete weights",
        )
