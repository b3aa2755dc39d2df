"""config.json of a trained draft in the speculators format -> DSparkConfig."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from speculators_cli.core.algorithms.dflash.config_reader import read_block_config
from speculators_cli.core.algorithms.draft_config_reader import CONVERT_HINT
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values
from speculators_cli.settings.algorithms.dspark import MARKOV_HEAD_TYPES


def read_draft_config(
    content: Mapping[str, Any], overrides: Overrides, *, name: str
) -> DSparkConfig:
    """Read the config of a trained draft of any tool.

    Raises:
        CheckpointError: This package does not compute it, or a value is missing.
    """
    values = Values(content, name)
    if not values.switch("sample_from_anchor"):
        raise CheckpointError(
            f"`{name}` does not predict from its anchor (`sample_from_anchor` is off)",
            hint=CONVERT_HINT,
        )
    kind = values.text("markov_head_type") or "vanilla"
    if kind not in MARKOV_HEAD_TYPES:
        raise values.error("markov_head_type", "`vanilla`, `gated` or `rnn`")
    rank = values.size("markov_rank")
    if rank is None:
        raise CheckpointError(f"The config.json of `{name}` has no markov_rank", hint=CONVERT_HINT)
    has_confidence = values.switch("enable_confidence_head") or False
    if has_confidence and not values.switch("confidence_head_with_markov"):
        raise values.error("confidence_head_with_markov", "`true`")
    block = read_block_config(values, overrides, first_slot=DSparkConfig.first_slot)
    shared = {field.name: getattr(block, field.name) for field in fields(block)}
    # The engine's rule, whatever the config says.
    shared["causal_block"] = block.draft_window is not None
    return DSparkConfig(
        **shared, markov_rank=rank, markov_head_type=kind, has_confidence=has_confidence
    )
