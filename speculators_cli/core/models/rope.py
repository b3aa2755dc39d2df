"""RoPE of a draft: parameters adopted from the verifier, support checks, and frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.models.decoder_config import DecoderConfig

DEFAULT_THETA = 10000.0
SMALLEST, LARGEST = 1e-9, 1e15
_LENGTH = "original_max_position_embeddings"
# The keys that the frequencies of each type depend on, beside `rope_theta`, in the llama and qwen3
# layers of serving engines.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "longrope": ("short_factor", "long_factor", _LENGTH),
}
_OPTIONAL = {
    "yarn": (
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("attention_factor", "truncate"),
    ),
    "longrope": ("factor", "attention_factor", "short_mscale", "long_mscale"),
}
ROPE_TYPES = tuple(_REQUIRED)
# Keys that engines apply and this package does not, with the value that has no effect.
_NOT_COMPUTED: Mapping[str, float | None] = {
    "partial_rotary_factor": 1.0,
    "rope_dim": None,  # no effect: the head size
    "max_trained_positions": None,  # no effect: the longest position
    "mrope_section": None,
    "use_fope": 0.0,
    "attn_factor": 1.0,
    "extrapolation_factor": 1.0,
}
_AT_THE_TOP = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"),
    _LENGTH: (_LENGTH,),
}


class RopeError(ValueError):
    """Why a RoPE is not supported; completes a sentence about it."""


@dataclass(frozen=True)
class ChosenRope:
    """RoPE of a draft for a verifier."""

    parameters: Mapping[str, Any]
    left_out: str | None  # what the draft layer does not adopt of the verifier's RoPE


def choose_rope(found: Any, *, head_dim: int, max_position_embeddings: int) -> ChosenRope:
    """Choose the RoPE of the verifier's full-attention layers, as in the llama layer of an engine.

    A draft may have another RoPE, as long as it is the same in training and serving. So where a
    layer does not support the verifier's, it has plain RoPE with the verifier's theta.

    Args:
        found: The `rope_parameters` of the verifier's text model, of any form.
        head_dim: Of the draft.
        max_position_embeddings: Of the verifier.
    """
    given = _full_attention(found) if isinstance(found, Mapping) else {}
    theta, left_out = DEFAULT_THETA, None
    try:
        if given.get("rope_theta") is not None:
            theta = float(_number(given, "rope_theta"))
    except RopeError as error:
        left_out = str(error)
    partial = given.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        left_out = f"rotates only {partial} of each head (`partial_rotary_factor`)"
    # For text, all sections of a multimodal RoPE rotate by the same position.
    dropped = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "type")
    kept = {key: value for key, value in given.items() if key not in dropped}
    kind = given.get("rope_type", given.get("type", "default"))
    whole = {"rope_type": "default", **kept, "rope_theta": theta}
    whole["rope_type"] = "default" if kind == "mrope" else kind
    try:
        parameters = check_rope(
            whole, head_dim=head_dim, max_position_embeddings=max_position_embeddings
        )
    except RopeError as error:
        return ChosenRope({"rope_type": "default", "rope_theta": theta}, left_out or str(error))
    return ChosenRope(parameters, left_out)


def read_rope(
    layers: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int
) -> dict[str, Any]:
    """Read the RoPE of a trained draft's decoder layers from its config.json.

    Raises:
        RopeError: It is not supported.
    """
    rope = gather_rope(layers)
    if not isinstance(rope, Mapping):
        raise RopeError(f"is `{rope}`, expected an object")
    return check_rope(rope, head_dim=head_dim, max_position_embeddings=max_position_embeddings)


def gather_rope(layers: Mapping[str, Any]) -> Any:
    """Collect the RoPE parameters in a config.json, from all their keys, as transformers does.

    Returns:
        A JSON object; another value where the config has one.
    """
    found = layers.get("rope_scaling") or layers.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        return found
    own = {key: value for key, value in found.items() if value is not None}
    # Other names of the same value at the top level of the config, as engines look them up.
    for key, names in _AT_THE_TOP.items():
        values = [layers[name] for name in names if layers.get(name) is not None]
        if values and (key not in own or key == _LENGTH):
            own[key] = values[0]
    kind = own.get("rope_type", own.get("type", "default"))
    return {"rope_type": kind, "rope_theta": DEFAULT_THETA} | own


def check_rope(
    rope: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int
) -> dict[str, Any]:
    """Return the parameters of the frequencies, with their types checked, and no other key.

    Raises:
        RopeError: An engine would apply a parameter that is not supported.
    """
    given = {key: value for key, value in rope.items() if value is not None}
    given.setdefault("rope_theta", DEFAULT_THETA)
    kind = _find_kind(given)
    _refuse_not_computed(given, head_dim, max_position_embeddings)
    if kind == "dynamic" and "alpha" in given:
        # A constant factor of theta, under another name.
        stretch = _number(given, "alpha") ** (head_dim / max(head_dim - 2, 1))
        return {"rope_type": "default", "rope_theta": _number(given, "rope_theta") * stretch}
    if _LENGTH in _REQUIRED[kind]:
        given.setdefault(_LENGTH, max_position_embeddings)
    if kind == "yarn" and "factor" not in given:
        given["factor"] = max_position_embeddings / _number(given, _LENGTH)
    missing = [key for key in _REQUIRED[kind] if key not in given]
    if missing:
        raise RopeError(f"is of type `{kind}` and lacks `{missing[0]}`")
    keys = ("rope_theta", *_REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    read = {"rope_type": kind} | {key: _value(given, key) for key in given if key in keys}
    if given.get("type") == kind:
        read["type"] = kind
    _check_kind(read, head_dim, max_position_embeddings)
    return {key: read[key] for key in ("rope_type", *given) if key in read}


def _full_attention(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the RoPE of full-attention layers, where each layer type has its own."""
    nested = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    if not nested and "full_attention" not in given:
        return given
    chosen = nested.get("full_attention") or next(iter(nested.values()), {})
    return {**chosen, "rope_theta": chosen.get("rope_theta", given.get("rope_theta"))}


def _find_kind(given: Mapping[str, Any]) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    legacy = given.get("type", kind)
    if legacy != kind and (legacy, kind) not in (("su", "longrope"), ("mrope", "default")):
        raise RopeError(f"has conflicting `rope_type` `{kind}` and `type` `{legacy}`")
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise RopeError(f"is of type `{kind}`")
    return kind


def _refuse_not_computed(
    given: Mapping[str, Any], head_dim: int, max_position_embeddings: int
) -> None:
    if head_dim % 2:
        raise RopeError(f"needs an even head size, got {head_dim}")
    neutral = dict(_NOT_COMPUTED) | {
        "rope_dim": float(head_dim),
        "max_trained_positions": float(max_position_embeddings),
    }
    for key, value in given.items():
        if isinstance(value, Mapping):
            raise RopeError(f"has separate values for `{key}`")
        if key in neutral and not _is_number(value, neutral[key]):
            raise RopeError(f"has `{key}` `{value}`")


def _is_number(value: object, expected: float | None) -> bool:
    try:
        return float(value) == expected  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _value(given: Mapping[str, Any], key: str) -> Any:
    if key == "truncate":
        if not isinstance(given[key], bool):
            raise RopeError(f"has `truncate` `{given[key]}`, expected `true` or `false`")
        return given[key]
    if key in ("short_factor", "long_factor"):
        if not isinstance(given[key], list | tuple):
            raise RopeError(f"has `{key}` `{given[key]}`, expected a list")
        return [_number({key: value}, key) for value in given[key]]
    return _number(given, key)


def _number(given: Mapping[str, Any], key: str) -> float:
    """Return a positive number within the range of float32; it may be a string."""
    value: float | str = given[key]
    try:
        if isinstance(value, str):
            value = int(value) if value.isdigit() else float(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and SMALLEST <= value <= LARGEST:
            return value
    except ValueError:
        pass
    shown = str(given[key])[:60]
    raise RopeError(f"has `{key}` `{shown}`, expected a positive number")


def _check_kind(read: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
    """Reject inconsistent values, and those that engines interpret in different ways."""
    kind = read["rope_type"]
    if kind == "linear":
        read["factor"] = float(read["factor"])  # Engines parse an integer as a list.
    if _LENGTH in read and (read[_LENGTH] != int(read[_LENGTH]) or read[_LENGTH] < 2):
        raise RopeError(f"has `{_LENGTH}` `{read[_LENGTH]}`, expected a whole number")
    if kind == "llama3" and read["low_freq_factor"] >= read["high_freq_factor"]:
        raise RopeError("has a `low_freq_factor` that is not below its `high_freq_factor`")
    if kind == "yarn" and read["rope_theta"] <= 1:
        raise RopeError(f"has `rope_theta` `{read['rope_theta']}`, expected more than 1")
    if kind == "longrope":
        _check_longrope(read, head_dim, max_position_embeddings)


def _check_longrope(read: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
    for key in ("short_factor", "long_factor"):
        if len(read[key]) != head_dim // 2:
            raise RopeError(f"has {len(read[key])} values in `{key}`, expected {head_dim // 2}")
    ratio = max_position_embeddings / read[_LENGTH]
    # Some engines use these two, others only the lengths.
    if not math.isclose(read.get("factor", ratio), ratio, rel_tol=1e-6):
        raise RopeError(f"has `factor` {read['factor']}, but its lengths have the ratio {ratio:g}")
    usual = math.sqrt(1 + math.log(ratio) / math.log(read[_LENGTH])) if ratio > 1 else 1.0
    applied = read.get(_chosen_mscale(read, max_position_embeddings), usual)
    if not math.isclose(read.get("attention_factor", applied), applied, rel_tol=1e-6):
        raise RopeError(
            f"has `attention_factor` {read['attention_factor']}, but engines apply {applied:g}"
        )


def _chosen_mscale(rope: Mapping[str, Any], max_position_embeddings: int) -> str:
    return "long_mscale" if max_position_embeddings > rope[_LENGTH] else "short_mscale"


def find_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Return radians per position for each pair, and the factor of cosine and sine."""
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    if kind in ("yarn", "dynamic", "longrope"):
        return _ask_transformers(config)
    pairs = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    if kind == "default":
        return rope["rope_theta"] ** -pairs, 1.0
    frequencies = 1.0 / (rope["rope_theta"] ** pairs)
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    return _stretch_slow_pairs(frequencies, rope), 1.0


def _stretch_slow_pairs(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Type `llama3`: slow pairs are slower by a factor, fast ones as before, others in between."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length, wavelengths = rope[_LENGTH], 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    is_slow, is_fast = wavelengths > length / low, wavelengths < length / high
    stretched = torch.where(is_slow, frequencies / factor, frequencies)
    return torch.where(is_slow | is_fast, stretched, between)


def _ask_transformers(config: DecoderConfig) -> tuple[Tensor, float]:
    """Compute the types that few verifiers have; takes seconds to import."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    given = (
        rope.get(_chosen_mscale(rope, config.max_position_embeddings))
        if kind == "longrope"
        else None
    )
    known = {key: value for key, value in rope.items() if not key.endswith("_mscale")}
    layer = LlamaConfig(
        hidden_size=config.head_dim,
        num_attention_heads=1,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=known,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](layer, seq_len=config.max_position_embeddings)
    return frequencies, scale if given is None else given
