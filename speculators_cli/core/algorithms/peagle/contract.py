"""The export contract of a P-EAGLE draft: config.json, tensor names and required values."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.eagle3 import contract as eagle3
from speculators_cli.core.algorithms.export_format import (
    ExportFormat,
    Need,
    Rule,
    equals,
    find_bad_mask,
    token_rule,
)
from speculators_cli.core.algorithms.peagle.config import PEagleConfig

# Switches of EAGLE-3 that the engine does not pass on to these drafts.
UNREAD = ("fc_norm", "norm_output")
RULES = (
    *(rule for rule in eagle3.SPECULATORS_RULES if rule.key not in UNREAD),
    Rule("fc_norm", "`false`", equals(False)),
    token_rule("mask_token_id"),
)
# Keys of the layers that the engine takes for the mask token before the one of the draft.
OTHER_MASKS = ("dflash_config", "mask_token_id", "dspark_noise_token_id")
NEEDS = (Need(lambda _: True, "0.32.0", "were not tested with P-EAGLE drafts of this package"),)


def _find_obstacles(config: PEagleConfig) -> list[str]:
    found = eagle3.find_obstacles(config)
    if config.fc_norm:
        found.append("its `fc_norm` is on, which the engine does not read for P-EAGLE drafts")
    return found + find_bad_mask(config)


def _find_contradictions(config: PEagleConfig, content: Mapping[str, Any]) -> list[str]:
    layers = content["transformer_layer_config"]
    return [
        *eagle3.find_contradictions(config, content),
        *find_bad_mask(config),
        *(
            f"`{key}` is in `transformer_layer_config`, where it overrides `mask_token_id`"
            for key in OTHER_MASKS
            if layers.get(key) is not None
        ),
    ]


FORMATS: Mapping[str, ExportFormat] = {
    "vllm": ExportFormat(
        method="eagle3",
        find_obstacles=_find_obstacles,
        rules=RULES,
        find_contradictions=_find_contradictions,
        needs=NEEDS,
        # Without it, the engine drafts token by token, and few are accepted.
        serve_options={"parallel_drafting": True},
    ),
}
