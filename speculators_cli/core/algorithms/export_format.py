"""ExportFormat: how drafts of an algorithm are written for an engine, and what it relies on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.models.decoder_config import FULL, SLIDING

LAYER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
OF_ROPE = ("rope_type", "type", "truncate")  # values that are not numbers


@dataclass(frozen=True)
class Rule:
    """One value that config.json must have."""

    key: str  # path of keys, with dots; a number is an index
    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Need:
    """A part of a draft that releases of an engine before `since` do not read."""

    has_it: Callable[[Any], bool]  # of the draft's config
    since: str
    before: str  # behaviour of older releases, as the end of a sentence


def keep_name(name: str) -> str:
    """The name of a tensor, unchanged from the checkpoint."""
    return name


def write_as_checkpoint(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a checkpoint: the speculators format."""
    return config.to_json(dtype=dtype)


def find_nothing(config: Any, content: Mapping[str, Any]) -> list[str]:  # noqa: ARG001
    """No values that contradict each other."""
    return []


@dataclass(frozen=True)
class ExportFormat:
    """The export contract of an algorithm with one engine. Functions take the draft's config."""

    method: str  # the engine's name of the algorithm
    find_obstacles: Callable[[Any], list[str]]  # why a draft cannot be written this way
    rules: tuple[Rule, ...]  # of config.json
    # config.json, with the name of a dtype
    build_config: Callable[[Any, str], dict[str, Any]] = write_as_checkpoint
    rename: Callable[[str], str] = keep_name  # a tensor, from its name in a checkpoint
    # Values of config.json that are valid but contradict each other.
    find_contradictions: Callable[[Any, Mapping[str, Any]], list[str]] = find_nothing
    needs: tuple[Need, ...] = ()  # those that fail silently come first
    # What the engine must be told beside the method, unless it reads the folder alone.
    serve_options: Mapping[str, Any] = field(default_factory=dict)


def layer_rules(prefix: str, *, has_windows: bool = False) -> tuple[Rule, ...]:
    """Rules of a draft's decoder layers, under a prefix of their keys.

    Args:
        prefix: Of the keys.
        has_windows: Whether the engine reads sliding windows.
    """
    layer_types = Rule(f"{prefix}layer_types", f"`{FULL}` only", _is_list_of(FULL))
    if has_windows:
        layer_types = Rule(
            f"{prefix}layer_types", f"`{FULL}` or `{SLIDING}`", _is_list_of(FULL, SLIDING)
        )
    return (
        *(Rule(f"{prefix}{key}", "a positive whole number", is_size) for key in LAYER_SIZES),
        Rule(
            f"{prefix}rms_norm_eps",
            "a positive number",
            lambda x: isinstance(x, float) and _is_positive(x),
        ),
        Rule(f"{prefix}hidden_act", "`silu`", equals("silu")),
        Rule(f"{prefix}rope_parameters", "`rope_type`, `rope_theta` and numbers", _is_rope),
        Rule(f"{prefix}attention_bias", "`false`", equals(False)),
        Rule(f"{prefix}mlp_bias", "`false`", lambda value: value in (None, False)),
        Rule(f"{prefix}tie_word_embeddings", "`false`", equals(False)),
        layer_types,
        Rule("draft_vocab_size", "a positive whole number", is_size),
    )


def token_rule(key: str) -> Rule:
    """The rule of a token id."""
    return Rule(key, "a token id", lambda value: _is_whole(value) and value >= 0)


def find_bad_mask(config: Any) -> list[str]:
    """Whether a draft's mask token has no embedding."""
    mask, vocab_size = config.mask_token_id, config.vocab_size
    if mask < vocab_size:
        return []
    return [f"its mask token {mask:,} is not among the verifier's {vocab_size:,} tokens"]


def layer_ids_rule(key: str) -> Rule:
    """The rule of a list of verifier layers."""
    return Rule(key, "strictly ascending layer ids", _are_ascending)


def switch_rule(key: str) -> Rule:
    """The rule of a switch that must be written out."""
    return Rule(key, "`true` or `false`", lambda value: isinstance(value, bool))


def equals(expected: object) -> Callable[[Any], bool]:
    """Whether a value is the expected one."""
    return lambda value: bool(value == expected)


def is_size(value: Any) -> bool:
    """Whether a value is a positive whole number."""
    return _is_whole(value) and value > 0


def is_name(value: Any) -> bool:
    """Whether a value is a non-empty string."""
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
    """Whether every value of a RoPE is a number, a list of numbers, a name or a switch."""
    if not isinstance(value, dict) or not is_name(value.get("rope_type")):
        return False
    others = {key: x for key, x in value.items() if key not in OF_ROPE}
    lists = [x if isinstance(x, list) else [x] for x in others.values()]
    return "rope_theta" in value and all(_is_positive(x) for listed in lists for x in listed)


def _is_list_of(*kinds: str) -> Callable[[Any], bool]:
    """Whether a value is missing, or a list of nothing but these."""
    return lambda value: (
        value is None
        or (isinstance(value, list) and bool(value) and all(kind in kinds for kind in value))
    )
