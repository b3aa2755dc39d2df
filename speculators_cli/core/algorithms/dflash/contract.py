"""The export contract of a DFlash draft: config.json, tensor names and required values."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.config_reader import ARCHITECTURE, OWN_PART
from speculators_cli.core.algorithms.export_format import (
    ExportFormat,
    Need,
    Rule,
    equals,
    find_bad_mask,
    is_size,
    layer_ids_rule,
    layer_rules,
    switch_rule,
    token_rule,
)

IDS = DFlashConfig.layer_ids_key
LAYERS = "transformer_layer_config."
KINDS = ("full_attention", "sliding_attention")


def _is_block(value: Any) -> bool:
    return is_size(value) and value > 1


def _is_one_kind(value: Any) -> bool:
    kinds = set(map(str, value)) if isinstance(value, list) else set()
    return len(kinds) == 1 and kinds <= set(KINDS)


def _rules_of_layers(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}model_type", "`qwen3`", equals("qwen3")),
        *(
            rule
            for rule in layer_rules(prefix)
            if rule.key not in (f"{prefix}layer_types", "draft_vocab_size")
        ),
        # Without it, a window is not read; of several kinds, not every engine can have.
        Rule(f"{prefix}layer_types", "layers of one kind of attention", _is_one_kind),
    )


SPECULATORS_RULES = (
    *_rules_of_layers(LAYERS),
    Rule("draft_vocab_size", "a positive whole number", is_size),
    Rule("target_hidden_size", "a positive whole number", is_size),
    layer_ids_rule(IDS),
    Rule("block_size", "a whole number above 1", _is_block),
    token_rule("mask_token_id"),
    Rule("sample_from_anchor", "`false`", equals(False)),
    switch_rule("sliding_window_non_causal"),
)
PLAIN_RULES = (
    Rule("architectures", f"`{ARCHITECTURE}`", equals([ARCHITECTURE])),
    *_rules_of_layers(""),
    Rule("block_size", "a whole number above 1", _is_block),
    Rule("num_target_layers", "a positive whole number", is_size),
    layer_ids_rule(f"{OWN_PART}.target_layer_ids"),
    token_rule(f"{OWN_PART}.mask_token_id"),
    switch_rule("is_causal"),
)
NEEDS = (Need(lambda _: True, "0.32.0", "were not tested with DFlash drafts of this package"),)


def _find_plain_obstacles(config: DFlashConfig) -> list[str]:
    found = find_bad_mask(config)
    if config.owns_head:
        found.append(
            f"it has {config.draft_vocab_size:,} of {config.vocab_size:,} tokens, and the engine "
            "reads no `d2t`: train it with `--full-vocab`"
        )
    if 0 in config.target_layer_ids:
        found.append("it reads the verifier's embedding output, which the engine does not provide")
    return found


def _plain_config(config: DFlashConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        **config.layers_json(vocab_size=config.vocab_size),
        **config.attention_json(),
        "is_causal": config.causal_block,
        "block_size": config.block_size,
        "num_target_layers": config.num_aux_layers,
        OWN_PART: {
            # This format counts the layer whose output is taken, not the layers passed.
            "target_layer_ids": [k - 1 for k in config.target_layer_ids],
            "mask_token_id": config.mask_token_id,
        },
        "dtype": dtype,
        **config.own_json(),
    }


def find_contradictions(config: DFlashConfig, content: Mapping[str, Any]) -> list[str]:
    """Values of config.json that are valid but contradict each other."""
    found = find_bad_mask(config)
    layers = content.get("transformer_layer_config", {})
    if len(layers.get("layer_types", [])) not in (0, config.num_layers):
        found.append("`layer_types` has another number of layers than `num_hidden_layers`")
    if layers.get("is_causal") is not None:
        # It overrides `sliding_window_non_causal`.
        found.append("`is_causal` is in `transformer_layer_config`")
    methods = content.get("speculators_config", {}).get("proposal_methods", [{}])
    num_tokens = methods[0].get("speculative_tokens")
    if num_tokens is not None and num_tokens != config.num_draft_tokens:
        found.append(
            f"`speculative_tokens` is {num_tokens}, with blocks of {config.block_size} tokens: "
            "fewer or more masks change every draft token"
        )
    return found


FORMATS: Mapping[str, ExportFormat] = {
    "vllm": ExportFormat(
        method="dflash",
        find_obstacles=find_bad_mask,
        rules=SPECULATORS_RULES,
        find_contradictions=find_contradictions,
        needs=NEEDS,
    ),
    "sglang": ExportFormat(
        method="DFLASH",
        find_obstacles=_find_plain_obstacles,
        build_config=_plain_config,
        rules=PLAIN_RULES,
        find_contradictions=find_contradictions,
    ),
}
