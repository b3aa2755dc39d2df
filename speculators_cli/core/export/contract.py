"""What an engine silently relies on, checked in a written folder: config.json, names, shapes, maps.

An engine does not complain of a missing tensor or of a value it has a default for: it drafts
nothing that is accepted. So every value it reads must be there, and every tensor, and no other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.config_reader import read_draft_config
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import EMBEDDING
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.repo_files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from speculators_cli.core.reading import UnreadableError, open_safetensors, read_json_object

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Rule:
    """One value that config.json must hold."""

    key: str  # path of keys, with dots; a number is an index
    expected: str
    holds: Callable[[Any], bool]


def _is(expected: object) -> Callable[[Any], bool]:
    return lambda value: bool(value == expected)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_ascending(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(_is_whole(x) and x >= 0 for x in value) and value == sorted(set(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_rope(value: Any) -> bool:
    """Whether every value of a RoPE is a number, a list of them, a name or a switch."""
    if not isinstance(value, dict) or not _is_name(value.get("rope_type")):
        return False
    others = {key: x for key, x in value.items() if key not in ("rope_type", "type", "truncate")}
    lists = [x if isinstance(x, list) else [x] for x in others.values()]
    return "rope_theta" in value and all(_is_positive(x) for listed in lists for x in listed)


def _is_full_attention(value: Any) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) == {"full_attention"})


_LAYER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def _layer_rules(prefix: str) -> tuple[Rule, ...]:
    return (
        *(Rule(f"{prefix}{key}", "a positive whole number", _is_size) for key in _LAYER_SIZES),
        Rule(
            f"{prefix}rms_norm_eps",
            "a positive number",
            lambda x: isinstance(x, float) and _is_positive(x),
        ),
        Rule(f"{prefix}hidden_act", "`silu`", _is("silu")),
        Rule(f"{prefix}rope_parameters", "`rope_type`, `rope_theta` and numbers", _is_rope),
        Rule(f"{prefix}attention_bias", "`false`", _is(False)),
        Rule(f"{prefix}mlp_bias", "`false`", lambda value: value in (None, False)),
        Rule(f"{prefix}tie_word_embeddings", "`false`", _is(False)),
        Rule(f"{prefix}layer_types", "`full_attention` only", _is_full_attention),
        Rule("draft_vocab_size", "a positive whole number", _is_size),
    )


_IDS = "strictly ascending layer ids"
VLLM_RULES = (
    Rule("model_type", "`speculators`", _is("speculators")),
    Rule("speculators_model_type", "`eagle3`", _is("eagle3")),
    Rule("speculators_config.algorithm", "`eagle3`", _is("eagle3")),
    Rule("speculators_config.default_proposal_method", "`greedy`", _is("greedy")),
    Rule("speculators_config.proposal_methods.0.proposal_type", "`greedy`", _is("greedy")),
    Rule("speculators_config.proposal_methods.0.speculative_tokens", "a whole number", _is_size),
    Rule("speculators_config.verifier.name_or_path", "a name", _is_name),
    Rule("speculators_config.verifier.architectures", "a list", lambda x: isinstance(x, list)),
    Rule(
        "transformer_layer_config.model_type",
        "`llama` or `qwen3`",
        lambda x: x in ("llama", "qwen3"),
    ),
    *_layer_rules("transformer_layer_config."),
    Rule("target_hidden_size", "a positive whole number", _is_size),
    Rule("eagle_aux_hidden_state_layer_ids", _IDS, _are_ascending),
    *(
        Rule(key, "`true` or `false`", _is_switch)
        for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    ),
)
PLAIN_RULES = (
    Rule("architectures", "`LlamaForCausalLMEagle3`", _is(["LlamaForCausalLMEagle3"])),
    Rule("model_type", "`llama`", _is("llama")),
    *_layer_rules(""),
    Rule("norm_before_residual", "`false`", _is(False)),
)
RULES: Mapping[str, tuple[Rule, ...]] = {
    "vllm": VLLM_RULES,
    "eagle": (*PLAIN_RULES, Rule("eagle_aux_hidden_state_layer_ids", _IDS, _are_ascending)),
    "sglang": (
        *PLAIN_RULES,
        Rule("eagle_config.eagle_aux_hidden_state_layer_ids", _IDS, _are_ascending),
    ),
}


def find_problems(folder: Path, target: str) -> list[str]:
    """Everything in an exported folder that its engine would trip over, or silently misread."""
    try:
        content = read_json_object(folder / CONFIG_NAME)
    except UnreadableError as error:
        return [f"`{CONFIG_NAME}` {error.reason}"]
    problems = [
        f"`{rule.key}` in `{CONFIG_NAME}` is `{_get(content, rule.key)}`, expected {rule.expected}"
        for rule in RULES[target]
        if not rule.holds(_get(content, rule.key))
    ]
    if problems:
        return problems
    # A plain config names no verifier, and none is needed to check tensors.
    given = Overrides(verifier_name_or_path="verifier", verifier_architectures=("any",))
    try:
        config = read_draft_config(content, given, name=str(folder))
    except CheckpointError as error:
        return [error.message]
    return [*_find_odd_sizes(config, content), *_find_tensor_problems(folder, config)]


def _find_odd_sizes(config: Eagle3Config, content: Mapping[str, Any]) -> list[str]:
    """Values that are fine alone but contradict each other."""
    found = []
    if config.num_heads % config.num_kv_heads:
        found.append(
            f"{config.num_heads} heads cannot share {config.num_kv_heads} key heads evenly"
        )
    if config.draft_vocab_size > config.vocab_size:
        found.append(
            f"`draft_vocab_size` {config.draft_vocab_size:,} exceeds `vocab_size` "
            f"{config.vocab_size:,}"
        )
    if config.norm_before_fc and config.fc_norm:
        found.append("`norm_before_fc` and `fc_norm` are both on")
    said = content.get("transformer_layer_config", {}).get("num_aux_hidden_states", 3)
    if said != config.num_aux_layers:
        found.append(
            f"`num_aux_hidden_states` is {said}, with {config.num_aux_layers} verifier layers"
        )
    return found


def _find_tensor_problems(folder: Path, config: Eagle3Config) -> list[str]:
    try:
        headers = _read_headers(folder)
        found = {_checkpoint_name(name): header for name, header in headers.items()}
        problems = _find_header_problems(found, config)
        return problems or _find_map_problems(folder, found, config)
    except ValueError as error:
        return [f"the weights cannot be read: {error}"]


@dataclass(frozen=True)
class _Header:
    file: str
    dtype: str
    shape: tuple[int, ...]


def _read_headers(folder: Path) -> dict[str, _Header]:
    """Every tensor of every weights file, as an engine finds them: by the names of files."""
    index_file = folder / INDEX_NAME
    listed = [WEIGHTS_NAME]
    weight_map = None
    if index_file.exists():
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
            raise ValueError(f"`{INDEX_NAME}` has no `weight_map` of names")
        listed = sorted(set(weight_map.values()))
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    if present != listed:
        raise ValueError(f"the folder has {present}, expected {listed}")
    headers: dict[str, _Header] = {}
    for name in present:
        with open_safetensors(folder / name) as tensors:
            for key in tensors.names():
                part = tensors.get_slice(key)
                headers[key] = _Header(name, part.get_dtype(), tuple(part.get_shape()))
    if weight_map is not None and weight_map != {key: x.file for key, x in headers.items()}:
        raise ValueError(f"`{INDEX_NAME}` does not say which file holds each tensor")
    return headers


def _find_header_problems(found: Mapping[str, _Header], config: Eagle3Config) -> list[str]:
    maps = {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    expected = config.tensor_shapes()
    if config.draft_vocab_size != config.vocab_size:
        expected |= maps
    problems = [f"`{name}` is missing" for name in expected if name not in found]
    if EMBEDDING in found:
        expected[EMBEDDING] = (config.vocab_size, config.hidden_size)
    elif config.hidden_size != config.target_hidden_size:
        problems.append(f"`{EMBEDDING}` is missing, and the verifier's has another width")
    dtypes = {"d2t": ("I64",), "t2d": ("BOOL",)}
    for name, header in found.items():
        if name not in expected:
            problems.append(f"`{name}` is not a tensor the engine knows of this draft")
        elif header.shape != expected[name]:
            problems.append(f"`{name}` is {header.shape}, expected {expected[name]}")
        elif header.dtype not in dtypes.get(name, FLOATS):
            problems.append(f"`{name}` is {header.dtype}, expected {dtypes.get(name, FLOATS)}")
    return problems


def _find_map_problems(
    folder: Path, found: Mapping[str, _Header], config: Eagle3Config
) -> list[str]:
    if "d2t" not in found:
        return []
    maps = []
    for name in ("d2t", "t2d"):
        with open_safetensors(folder / found[name].file) as tensors:
            maps.append(tensors.get_tensor(name))
    d2t, t2d = maps
    ids = d2t + torch.arange(len(d2t))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or not (ids.diff() > 0).all():
        return [
            f"`d2t` gives ids from {int(ids.min()):,} to {int(ids.max()):,}, expected ascending "
            f"ones below {config.vocab_size:,}: it must hold offsets, not ids"
        ]
    if not torch.equal(t2d.nonzero()[:, 0], ids):
        return ["`d2t` and `t2d` do not keep the same tokens"]
    return []


def _checkpoint_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.", 1)


def _get(content: object, key: str) -> Any:
    for part in key.split("."):
        if isinstance(content, list):
            content = content[int(part)] if int(part) < len(content) else None
        else:
            content = content.get(part) if isinstance(content, dict) else None
    return content
