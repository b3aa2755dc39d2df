"""The format of the EAGLE project, which vLLM serves too."""

from pathlib import Path
from typing import Any

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.export_format import Rule
from speculators_cli.core.export.targets.vllm import Vllm


class Eagle(Vllm):
    """Drafts whose config.json names no verifier."""

    name = "eagle"
    engine = "EAGLE"

    def rules(self, algorithm: Algorithm[Any, Any]) -> tuple[Rule, ...]:
        """The keys of the algorithm only."""
        return self.find_format(algorithm).rules

    def serve_command(self, config: DraftConfig, draft_dir: Path) -> str | None:
        """The command that serves the verifier with a draft, both of them explicit."""
        return self.explicit_command(config.verifier_name_or_path, str(draft_dir), config)
