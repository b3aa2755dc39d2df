"""Targets: how each serving engine wants a draft written, and which drafts it cannot run."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.models.config import Eagle3Config


@dataclass(frozen=True)
class Target:
    """A format of an export."""

    engine: str
    find_obstacles: Callable[[Eagle3Config], list[str]]  # why a draft cannot be written so
    build_config: Callable[[Eagle3Config, str], dict[str, Any]]  # with the name of a dtype
    rename: Callable[[str], str]  # a tensor, from its name in a checkpoint


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
        **config.producer_json(),
    }
    if config.target_hidden_size != config.hidden_size:
        content["target_hidden_size"] = config.target_hidden_size
    return content


def _sglang_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    content = _plain_config(config, dtype)
    # That engine counts the layer whose output is taken, not the layers passed.
    ids = [k - 1 for k in content.pop("eagle_aux_hidden_state_layer_ids")]
    return content | {
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids}
    }


def _sglang_obstacles(config: Eagle3Config) -> list[str]:
    found = _plain_obstacles(config)
    if 0 in config.target_layer_ids:
        found.append("it reads the verifier's embedding output, which the engine cannot give it")
    return found


def vllm_command(verifier: str, draft: str, num_tokens: int) -> str:
    """The command that serves a verifier with a draft, wherever the two lie."""
    options = {"method": "eagle3", "model": draft, "num_speculative_tokens": num_tokens}
    line = shlex.quote(json.dumps(options))
    return f"vllm serve {shlex.quote(verifier)} --speculative-config {line}"


def _keep(name: str) -> str:
    return name


def _midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1)


TARGETS: Mapping[str, Target] = {
    "vllm": Target("vLLM", _vllm_obstacles, _vllm_config, _keep),
    "sglang": Target("SGLang", _sglang_obstacles, _sglang_config, _midlayer),
    "eagle": Target("EAGLE-3", _plain_obstacles, _plain_config, _midlayer),
}
