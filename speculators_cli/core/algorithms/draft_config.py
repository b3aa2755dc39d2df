"""DraftConfig: the config fields that all draft models have, for any algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

from speculators_cli import __version__
from speculators_cli.core.models.decoder_config import DecoderConfig

PRODUCER = "speculators-cli"
LAYER_IDS_ASSUMED = "layer_ids_assumed"  # true if the layer ids are a guess


@dataclass(frozen=True, kw_only=True)
class DraftConfig(DecoderConfig, ABC):
    """All values that determine the shape and computation of a draft model."""

    algorithm: ClassVar[str]  # its name in the table of algorithms, and in config.json
    layer_ids_key: ClassVar[str]  # of `target_layer_ids` in config.json

    target_hidden_size: int  # the verifier's; a draft trained here has the same
    vocab_size: int  # the verifier's embedding rows
    draft_vocab_size: int
    target_layer_ids: tuple[int, ...]  # id k: the verifier's output after k layers
    verifier_name_or_path: str
    verifier_architectures: tuple[str, ...]
    are_layer_ids_assumed: bool = False  # a guess that was not confirmed

    @property
    def num_aux_layers(self) -> int:
        """Number of verifier layers whose hidden states the draft reads."""
        return len(self.target_layer_ids)

    @property
    def owns_head(self) -> bool:
        """Whether the draft has an LM head of its own; else it uses the verifier's."""
        return True

    @property
    @abstractmethod
    def num_draft_tokens(self) -> int:
        """Draft tokens per verifier forward pass that it was trained for."""

    @abstractmethod
    def with_num_draft_tokens(self, num_draft_tokens: int) -> Self:
        """The same draft, proposing another number of tokens."""

    @abstractmethod
    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json in the speculators format, each value written out."""

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as in a checkpoint."""

    def count_parameters(self) -> int:
        """Number of weights of the draft itself, including its lm_head."""
        return sum(map(prod, self.tensor_shapes().values()))

    def speculators_json(self) -> dict[str, Any]:
        """The keys by which an engine recognises a draft in the speculators format."""
        return {
            "model_type": "speculators",
            "speculators_model_type": self.algorithm,
            "speculators_config": {
                "algorithm": self.algorithm,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": self.num_draft_tokens}
                ],
                "verifier": {
                    "name_or_path": self.verifier_name_or_path,
                    "architectures": list(self.verifier_architectures),
                },
            },
        }

    def own_json(self) -> dict[str, Any]:
        """Keys of our own in config.json, which no engine reads."""
        mark = {LAYER_IDS_ASSUMED: True} if self.are_layer_ids_assumed else {}
        return {**mark, "producer": {"name": PRODUCER, "version": __version__}}


@dataclass(frozen=True, kw_only=True)
class MaskConfig(DraftConfig, ABC):
    """The config of a draft that reads a mask in place of unknown tokens."""

    mask_token_id: int  # verifier id


def is_speculators(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the speculators format."""
    return content.get("speculators_model_type") is not None
