"""Targets: how each serving engine wants a draft written, and which drafts it cannot run."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.export.engine_rope import (
    Turning,
    find_rope_problem,
    sglang_turning,
    vllm_turning,
)


@dataclass(frozen=True)
class Target:
    """A format of an export."""

    engine: str
    find_obstacles: Callable[[Any], list[str]]  # why a draft cannot be written so
    build_config: Callable[[Any, str], dict[str, Any]]  # with the name of a dtype
    rename: Callable[[str], str]  # a tensor, from its name in a checkpoint
    turning: Callable[[Mapping[str, Any]], Turning]  # by its decoder layers in config.json

    def find_rope_problem(self, content: Mapping[str, Any], config: DraftConfig) -> str | None:
        """Why the engine would turn positions otherwise than in training, by config.json."""
        layers = content.get("transformer_layer_config", content)
        return find_rope_problem(layers, config, self.turning)


def _vllm_obstacles(config: Eagle3Config) -> list[str]:
    if config.norm_before_fc and config.fc_norm:
        return ["`norm_before_fc` and `fc_norm` exclude each other"]
    return []


def _vllm_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    return config.to_json(dtype=dtype)


def _plain_obstacles(config: Eagle3Config) -> list[str]:
    """What engines that read plain EAGLE-3 do not compute."""
    found = [
        f"its `{name}` is on, and the format has no such norm"
        for name in ("norm_before_fc", "fc_norm", "norm_output")
        if getattr(config, name)
    ]
    if config.norm_before_residual:
        found.append("its `norm_before_residual` is on, and the engine's residual starts pre-norm")
    if config.arch != "llama":
        found.append(f"its layers are `{config.arch}`, and the format has llama layers only")
    if config.num_layers != 1:
        found.append(f"it has {config.num_layers} layers, and the format has one")
    if config.num_aux_layers != 3:
        found.append(f"it reads {config.num_aux_layers} verifier layers, and the format has three")
    return found


def _plain_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    whole = config.to_json()
    content = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **whole["transformer_layer_config"],
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(config.target_layer_ids),
        "norm_before_residual": False,
        "dtype": dtype,
        **config.own_json(),
    }
    if config.target_hidden_size != config.hidden_size:
        content["target_hidden_size"] = config.target_hidden_size
    return content


def _sglang_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    content = _plain_config(config, dtype)
    # That engine counts the layer whose output is taken, not the layers passed.
    ids = [k - 1 for k in content.pop("eagle_aux_hidden_state_layer_ids")]
    return content | {
        "rope_parameters": _sglang_rope(config),
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids},
    }


def _sglang_rope(config: Eagle3Config) -> dict[str, Any]:
    """The RoPE that was trained, where the engine would choose another by the length at hand."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] == "dynamic":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if longrope_length(config) is not None:
        rope["short_factor"] = rope["long_factor"]
        if "long_mscale" in rope:
            rope["short_mscale"] = rope["long_mscale"]
    return rope


def _sglang_obstacles(config: Eagle3Config) -> list[str]:
    found = _plain_obstacles(config)
    if 0 in config.target_layer_ids:
        found.append("it reads the verifier's embedding output, which the engine cannot give it")
    return found


def longrope_length(config: DraftConfig) -> int | None:
    """Tokens that vLLM must be given more than, to turn positions by the long factors of LongRoPE.

    Returns:
        None if it always turns positions as in training.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    length = int(rope["original_max_position_embeddings"])
    return length if config.max_position_embeddings > length else None


def length_option(config: DraftConfig) -> str:
    """What a vLLM command must end with for a draft, if anything."""
    length = longrope_length(config)
    if length is None:
        return ""
    return f" --max-model-len {min(2 * length, config.max_position_embeddings)}"


def vllm_command(verifier: str, draft: str, config: DraftConfig) -> str:
    """The command that serves a verifier with a draft, wherever the two lie."""
    options = {
        "method": "eagle3",
        "model": draft,
        "num_speculative_tokens": config.num_draft_tokens,
    }
    line = shlex.quote(json.dumps(options))
    command = f"vllm serve {shlex.quote(verifier)} --speculative-config {line}"
    return command + length_option(config)


def _keep(name: str) -> str:
    return name


def _midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1)


TARGETS: Mapping[str, Target] = {
    "vllm": Target("vLLM", _vllm_obstacles, _vllm_config, _keep, vllm_turning),
    "sglang": Target("SGLang", _sglang_obstacles, _sglang_config, _midlayer, sglang_turning),
    "eagle": Target("EAGLE-3", _plain_obstacles, _plain_config, _midlayer, vllm_turning),
}
