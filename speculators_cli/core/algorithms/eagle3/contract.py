"""The export contract of an EAGLE-3 draft: config.json, tensor names and required values."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.export_format import (
    ExportFormat,
    Need,
    Rule,
    equals,
    is_size,
    layer_ids_rule,
    layer_rules,
    switch_rule,
)

ARCHITECTURE = "LlamaForCausalLMEagle3"
MIXED = "some of its layers have a sliding window, and the engine needs the same in all layers"
IDS = Eagle3Config.layer_ids_key

SPECULATORS_RULES = (
    Rule(
        "transformer_layer_config.model_type",
        "`llama` or `qwen3`",
        lambda x: x in ("llama", "qwen3"),
    ),
    *layer_rules("transformer_layer_config.", has_windows=True),
    Rule("target_hidden_size", "a positive whole number", is_size),
    layer_ids_rule(IDS),
    *map(switch_rule, SWITCHES),
)
PLAIN_RULES = (
    Rule("architectures", f"`{ARCHITECTURE}`", equals([ARCHITECTURE])),
    Rule("model_type", "`llama`", equals("llama")),
    *layer_rules(""),
    Rule("norm_before_residual", "`false`", equals(False)),
)
# Which releases of vLLM read what, as measured by tests/vllm/try_versions.py, windows by source.
NEEDS = (
    Need(
        lambda config: config.norm_output,
        "0.25.0",
        "ignore its `norm_output` and silently accept fewer tokens",
    ),
    Need(
        lambda config: config.arch == "qwen3" and config.sliding_window is not None,
        "0.26.0",
        "ignore the sliding window of its qwen3 layers and silently accept fewer tokens",
    ),
    Need(lambda config: config.fc_norm, "0.25.0", "do not load its `fc_norm`"),
    Need(lambda config: config.arch == "qwen3", "0.25.0", "do not load its qwen3 layers"),
)


def find_obstacles(config: Eagle3Config) -> list[str]:
    """Options that vLLM does not support."""
    found = []
    if config.norm_before_fc and config.fc_norm:
        found.append("`norm_before_fc` and `fc_norm` exclude each other")
    if len(set(config.windows)) > 1:
        found.append(MIXED)
    return found


def _find_plain_obstacles(config: Eagle3Config) -> list[str]:
    """Options that engines for plain EAGLE-3 do not support."""
    found = [
        f"its `{name}` is on, and the format has no such norm"
        for name in ("norm_before_fc", "fc_norm", "norm_output")
        if getattr(config, name)
    ]
    if config.norm_before_residual:
        found.append(
            "its `norm_before_residual` is on, and the engine takes the residual before the norm"
        )
    if config.arch != "llama":
        found.append(f"its layers are `{config.arch}`, and the format has llama layers only")
    if config.num_layers != 1:
        found.append(f"it has {config.num_layers} layers, and the format has one")
    if config.sliding_window is not None:
        found.append(
            f"its layers have a sliding window of {config.sliding_window:,} tokens, and the format "
            "has full attention only"
        )
    if config.num_aux_layers != 3:
        found.append(f"it reads {config.num_aux_layers} verifier layers, and the format has three")
    return found


def _find_sglang_obstacles(config: Eagle3Config) -> list[str]:
    found = _find_plain_obstacles(config)
    if 0 in config.target_layer_ids:
        found.append("it reads the verifier's embedding output, which the engine does not provide")
    return found


def _plain_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    whole = config.to_json()
    content = {
        "architectures": [ARCHITECTURE],
        **whole["transformer_layer_config"],
        "draft_vocab_size": config.draft_vocab_size,
        IDS: list(config.target_layer_ids),
        "norm_before_residual": False,
        "dtype": dtype,
        **config.own_json(),
    }
    if config.target_hidden_size != config.hidden_size:
        content["target_hidden_size"] = config.target_hidden_size
    return content


def _sglang_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    content = _plain_config(config, dtype)
    # SGLang counts the layer whose output is taken, not the layers passed.
    ids = [k - 1 for k in content.pop(IDS)]
    return content | {"eagle_config": {"use_aux_hidden_state": True, IDS: ids}}


def find_contradictions(config: Eagle3Config, content: Mapping[str, Any]) -> list[str]:
    """Values of config.json that are valid but contradict each other."""
    found = []
    if config.norm_before_fc and config.fc_norm:
        found.append("`norm_before_fc` and `fc_norm` are both on")
    if len(set(config.windows)) > 1:
        found.append("`layer_types` has layers of both types")
    num_aux = content.get("transformer_layer_config", {}).get("num_aux_hidden_states", 3)
    if num_aux != config.num_aux_layers:
        found.append(
            f"`num_aux_hidden_states` is {num_aux}, with {config.num_aux_layers} verifier layers"
        )
    return found


def _plain_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1)


FORMATS: Mapping[str, ExportFormat] = {
    "vllm": ExportFormat(
        method="eagle3",
        find_obstacles=find_obstacles,
        rules=SPECULATORS_RULES,
        find_contradictions=find_contradictions,
        needs=NEEDS,
    ),
    "sglang": ExportFormat(
        method="EAGLE3",
        find_obstacles=_find_sglang_obstacles,
        build_config=_sglang_config,
        rules=(*PLAIN_RULES, layer_ids_rule(f"eagle_config.{IDS}")),
        rename=_plain_name,
        find_contradictions=find_contradictions,
    ),
    "eagle": ExportFormat(
        method="eagle3",
        find_obstacles=_find_plain_obstacles,
        build_config=_plain_config,
        rules=(*PLAIN_RULES, layer_ids_rule(IDS)),
        rename=_plain_name,
        find_contradictions=find_contradictions,
        needs=NEEDS,
    ),
}
