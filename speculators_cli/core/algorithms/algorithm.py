"""Algorithm: the interface between a drafting algorithm and the rest of the package."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from speculators_cli.core.algorithms.cost import CostModel
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.export_format import ExportFormat
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.base import Settings

ConfigT = TypeVar("ConfigT", bound=DraftConfig)
SettingsT = TypeVar("SettingsT", bound=Settings)


class Algorithm(ABC, Generic[ConfigT, SettingsT]):
    """A drafting algorithm: its config, training, drafter and cost model."""

    name: ClassVar[str]  # in `--algorithm` and checkpoints, and of the settings section
    settings_class: ClassVar[type[Settings]]  # the section of `speculators train`
    alignment: ClassVar[Alignment]  # which rows of a sample it trains on
    cost: CostModel[ConfigT, SettingsT]  # of a training step
    num_aux_layers: ClassVar[int] = 3  # verifier layers that it reads, where samples do not decide
    multiplies_in_float8: ClassVar[bool] = False  # whether its fast step can, if it is asked to
    title: ClassVar[str] = ""  # in model cards; empty: the name
    # Settings of the section that a model card lists, and their names in it.
    card_settings: ClassVar[Mapping[str, str]] = {}
    export_formats: ClassVar[Mapping[str, ExportFormat]] = {}  # by the name of the target

    @abstractmethod
    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of a draft of this algorithm."""

    @abstractmethod
    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> ConfigT:
        """The config of a trained draft, from any tool.

        Args:
            content: Of its config.json.
            overrides: Values that replace it, or fill in missing ones.
            name: The draft's, for messages.

        Raises:
            CheckpointError: It is not a draft of this algorithm, or one that this package does not
                compute.
        """

    def find_assumed(
        self,
        content: Mapping[str, Any],  # noqa: ARG002
        config: ConfigT,  # noqa: ARG002
    ) -> Mapping[str, Any]:
        """Values missing from config.json that no tensor determines, with their defaults."""
        return {}

    def ties_head(self, content: Mapping[str, Any], *, name: str) -> bool:  # noqa: ARG002
        """Whether a config.json ties the LM head to the embedding."""
        return False

    def count_aux_layers(self, config: ConfigT, tensors: Mapping[str, Tensor]) -> int | None:
        """Number of verifier layers that the weights read, under our names; None if unknown."""
        del config, tensors
        return None

    def checkpoint_name(self, tensor: str) -> str:
        """The name in our checkpoints of a tensor in another tool's draft."""
        return tensor

    def checkpoint_tensor(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002
        """A tensor of another tool's draft, under our name, in the shape of our checkpoints."""
        return tensor

    def find_unread(self, config: ConfigT) -> frozenset[str]:  # noqa: ARG002
        """Unused tensors that other tools save with a draft, under our names."""
        return frozenset()

    def fit_config(
        self,
        config: ConfigT,
        content: Mapping[str, Any],  # noqa: ARG002
        tensors: Mapping[str, Tensor],  # noqa: ARG002
    ) -> ConfigT:
        """The config with the values that the tensors, under our names, determine."""
        return config

    def choose_values(
        self,
        settings: SettingsT,
        files: VerifierFiles,
        vocab_size: int,
        *,
        trust_remote_code: bool,
    ) -> Mapping[str, Any]:
        """Config fields of a fresh draft that depend on the verifier's files.

        Raises:
            SettingsError: A setting does not fit the verifier.
        """
        del settings, files, vocab_size, trust_remote_code
        return {}

    @abstractmethod
    def build_config(self, settings: SettingsT, shape: Mapping[str, Any]) -> ConfigT:
        """The config of a fresh draft.

        Args:
            settings: The section of the run's settings.
            shape: The fields that every `DraftConfig` has, and those of `choose_values`, where the
                verifier has files.
        """

    def adopt(
        self,
        config: DraftConfig,  # noqa: ARG002
        settings: SettingsT,  # noqa: ARG002
    ) -> ConfigT | None:
        """The config of a draft that starts from one of another algorithm; None: it cannot.

        Weights of the same names are kept; others are those of a fresh draft.
        """
        return None

    def adapt_config(self, config: ConfigT, settings: SettingsT) -> ConfigT:
        """The config of a trained draft that is trained further with these settings."""
        del settings
        return config

    def fixed_settings(self, config: ConfigT) -> dict[str, Any]:
        """Settings of the section that a trained draft fixes."""
        del config
        return {}

    def kept_settings(self, config: ConfigT, settings: SettingsT) -> dict[str, Any]:
        """Settings of the section that a run has from a trained draft, unless they were given."""
        del config, settings
        return {}

    def frozen_weights(self, settings: SettingsT) -> frozenset[str]:
        """Names of the draft's own weights that are not trained."""
        del settings
        return frozenset()

    def check_samples(self, config: ConfigT, samples: SampleSource) -> None:
        """Refuse samples that a draft of this config cannot learn from.

        Raises:
            DataError: No sample can train a part of it, or a sample contradicts the config.
        """
        del config, samples

    def find_unsupported(self, config: ConfigT, settings: SettingsT) -> str | None:
        """Return what of a draft the fast kernels do not support; None if they do."""
        del config, settings
        return f"algorithm `{self.name}` has none"

    @abstractmethod
    def build(
        self,
        config: ConfigT,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: SettingsT,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> DraftModel:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""

    @abstractmethod
    def build_drafter(
        self,
        config: ConfigT,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> Drafter:
        """A trained draft that proposes tokens, in float32, on the device of the embedding.

        Args:
            config: Of the draft.
            weights: Those of `config.tensor_shapes()`.
            embedding: [vocab, hidden]: the verifier's, or the draft's own.
            kept_ids: [draft_vocab], int64: the verifier ids of draft ids.
            num_draft_tokens: Draft tokens per verifier forward pass.
            head: [vocab, hidden]: the verifier's LM head, for a draft that has none of its own.
        """

    def find_length_risk(
        self,
        config: ConfigT,  # noqa: ARG002
        num_draft_tokens: int,  # noqa: ARG002
    ) -> str | None:
        """What changes if a draft proposes this many tokens, as a sentence; None: the rest stay."""
        return None

    @abstractmethod
    def compute_probe_logits(
        self, config: ConfigT, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits of a trained draft over fixed random inputs; [rows, draft_vocab], float32.

        `export` compares these logits to check that two drafts are equal.
        """
