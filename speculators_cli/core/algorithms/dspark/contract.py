"""The export contract of a DSpark draft: config.json, tensor names and required values."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.dflash.contract import (
    SPECULATORS_RULES,
    find_contradictions,
)
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.export_format import (
    ExportFormat,
    Need,
    Rule,
    equals,
    find_bad_mask,
    is_size,
    switch_rule,
)

# Of DFlash, without those that the engine does not read, or reads as another value.
OTHER = ("sample_from_anchor", "sliding_window_non_causal")
RULES = (
    *(rule for rule in SPECULATORS_RULES if rule.key not in OTHER),
    Rule("sample_from_anchor", "`true`", equals(True)),
    Rule("markov_rank", "a positive whole number", is_size),
    Rule("markov_head_type", "`vanilla`", equals("vanilla")),
    switch_rule("enable_confidence_head"),
    switch_rule("confidence_head_with_markov"),
)
NEEDS = (Need(lambda _: True, "0.32.0", "were not tested with DSpark drafts of this package"),)


def _find_obstacles(config: DSparkConfig) -> list[str]:
    found = find_bad_mask(config)
    if config.markov_head_type != "vanilla":
        found.append(f"its Markov head is `{config.markov_head_type}`, vLLM computes `vanilla`")
    return found


def _find_contradictions(config: DSparkConfig, content: Mapping[str, Any]) -> list[str]:
    found = find_contradictions(config, content)
    if content["enable_confidence_head"] != content["confidence_head_with_markov"]:
        found.append("`enable_confidence_head` and `confidence_head_with_markov` differ")
    return found


FORMATS: Mapping[str, ExportFormat] = {
    "vllm": ExportFormat(
        method="dspark",
        find_obstacles=_find_obstacles,
        rules=RULES,
        find_contradictions=_find_contradictions,
        needs=NEEDS,
    ),
}
