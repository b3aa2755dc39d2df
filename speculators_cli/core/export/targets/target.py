"""Target: an engine that serves drafts, and the format it reads."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.export_format import ExportFormat, Rule
from speculators_cli.core.errors import ExportError
from speculators_cli.core.export.engine_rope import EngineRope, find_rope_problem


@dataclass(frozen=True)
class EngineAdvice:
    """The release of an engine that a draft needs."""

    oldest: str
    sentence: str


class Target(ABC):
    """What depends on the engine; what depends on the algorithm too is its `ExportFormat`."""

    name: ClassVar[str]  # in `--target`, and in the formats of an algorithm
    engine: ClassVar[str]

    def find_format(self, algorithm: Algorithm[Any, Any]) -> ExportFormat:
        """How drafts of an algorithm are written for this engine.

        Raises:
            ExportError: The algorithm has no format for it.
        """
        formats = algorithm.export_formats
        if self.name in formats:
            return formats[self.name]
        listed = " or ".join(f"`--target {name}`" for name in formats)
        raise ExportError(
            f"Drafts of algorithm `{algorithm.name}` cannot be exported for {self.engine}",
            hint=f"Pass {listed}" if listed else "Export a draft of another algorithm",
        )

    def format_of(self, config: DraftConfig) -> ExportFormat:
        """How a draft is written for this engine, by its algorithm."""
        return self.find_format(ALGORITHMS[config.algorithm])

    def find_obstacles(self, config: DraftConfig) -> list[str]:
        """Why the engine cannot run a draft; empty if it can."""
        found = self.format_of(config).find_obstacles(config)
        if found:
            return found
        rope = self.find_rope_problem(self.build_config(config, "float32"), config)
        return [] if rope is None else [rope]

    def build_config(self, config: DraftConfig, dtype: str) -> dict[str, Any]:
        """Contents of config.json, with the name of a dtype."""
        return self.format_of(config).build_config(config, dtype)

    def rules(self, algorithm: Algorithm[Any, Any]) -> tuple[Rule, ...]:
        """Values of config.json that the engine relies on."""
        return self.find_format(algorithm).rules

    def find_rope_problem(self, content: Mapping[str, Any], config: DraftConfig) -> str | None:
        """Why the engine would not apply the RoPE of the training, by config.json."""
        layers = content.get("transformer_layer_config", content)
        return find_rope_problem(layers, config, self.applied_rope)

    @abstractmethod
    def applied_rope(self, layers: Mapping[str, Any]) -> EngineRope:
        """The RoPE that the engine applies, by the values of decoder layers in config.json.

        Raises:
            ValueError: The engine would refuse the RoPE.
        """

    @abstractmethod
    def card_text(self, config: DraftConfig, draft_dir: Path) -> str:
        """How the draft is served, for its model card."""

    def serve_command(self, config: DraftConfig, draft_dir: Path) -> str | None:  # noqa: ARG002
        """The command that serves the verifier with a draft; None if there is not one."""
        return None

    def advise(self, config: DraftConfig) -> EngineAdvice | None:  # noqa: ARG002
        """The oldest release that reads all of a draft; None if none was measured."""
        return None

    def find_serving_risk(self, config: DraftConfig) -> str | None:  # noqa: ARG002
        """What can silently go wrong in serving a draft, whatever its config.json holds."""
        return None
