"""config.json of a trained draft, speculators or plain P-EAGLE -> PEagleConfig."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from speculators_cli.core.algorithms.draft_config import is_speculators
from speculators_cli.core.algorithms.eagle3.config_reader import (
    MASK_KEYS,
    has_mask,
    is_plain,
    read_eagle_config,
)
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values


def is_peagle(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a P-EAGLE draft, speculators or plain."""
    if is_speculators(content):
        return bool(content["speculators_model_type"] == PEagleConfig.algorithm)
    return is_plain(content) and has_mask(content)


def read_draft_config(
    content: Mapping[str, Any], overrides: Overrides, *, name: str
) -> PEagleConfig:
    """Read the config of a trained draft of any tool.

    Raises:
        CheckpointError: This package does not support it, or a value is missing.
    """
    values = Values(content, name)
    mask = next((values.token(key) for key in MASK_KEYS if values.has(key)), None)
    if mask is None:
        raise CheckpointError(
            f"The config.json of `{name}` lacks `mask_token_id`", hint="Download it again"
        )
    # Without the value, engines take the residual of these drafts before the norm.
    eagle = read_eagle_config(values, overrides, residual_after_norm=False)
    shared = {field.name: getattr(eagle, field.name) for field in fields(eagle)}
    return PEagleConfig(**shared, mask_token_id=mask)
