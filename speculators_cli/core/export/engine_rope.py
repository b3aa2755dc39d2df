"""What a serving engine turns positions by, from the values written in config.json alone.

Written down a second time, from how the engines read each key: an export is checked against it,
since the code that trained a draft cannot see a key that it does not read itself.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.models.decoder_config import DecoderConfig
from speculators_cli.core.models.rope import find_frequencies

# Training rounds to float32, a handful of operations for each frequency.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Turning:
    """Radians a position for each pair of a head, and what cosine and sine are multiplied by."""

    frequencies: tuple[float, ...]
    scale: float

    def is_close(self, other: "Turning") -> bool:
        """Whether both turn alike, but for rounding."""
        pairs = zip(self.frequencies, other.frequencies, strict=False)
        return (
            len(self.frequencies) == len(other.frequencies)
            and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs)
            and math.isclose(self.scale, other.scale, rel_tol=TOLERANCE)
        )


def find_rope_problem(
    layers: Mapping[str, Any],
    config: DecoderConfig,
    turning: Callable[[Mapping[str, Any]], Turning],
) -> str | None:
    """Why an engine would turn positions otherwise than in training; None: it does not.

    Args:
        layers: Of config.json as it is written: the values of its decoder layers.
        config: What was trained.
        turning: What the engine computes with.
    """
    kind = config.rope_parameters["rope_type"]
    try:
        served = turning(layers)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"its `{kind}` RoPE is not one the engine computes: {error}"
    if served.is_close(trained_turning(config)):
        return None
    return f"its `{kind}` RoPE is not the one it was trained with, as the engine computes it"


def trained_turning(config: DecoderConfig) -> Turning:
    """What a draft was trained with."""
    frequencies, scale = find_frequencies(config)
    return Turning(tuple(frequencies.tolist()), scale)


def vllm_turning(layers: Mapping[str, Any]) -> Turning:
    """What vLLM computes with, given more tokens than LongRoPE's original length.

    Args:
        layers: Of config.json: the values of its decoder layers.

    Raises:
        ValueError: It would refuse the RoPE.
    """
    rope, length = layers["rope_parameters"], layers["max_position_embeddings"]
    sections = [key for key in ("mrope_section", "use_fope") if rope.get(key)]
    if sections:
        raise ValueError(f"`{sections[0]}` turns by more than the position")
    size = int(layers["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    base, kind = rope.get("rope_theta", 10000), rope.get("rope_type", "default")
    plain = [base ** -(i / size) for i in range(0, size, 2)]
    if kind == "default":
        return Turning(tuple(plain), 1.0)
    if kind == "longrope":
        return _longrope(plain, rope, length)
    if kind == "yarn":
        return Turning(_yarn(plain, rope, base, size), _yarn_scale(rope))
    stretched = {"linear": _linear, "llama3": _llama3}
    if kind == "dynamic":
        return Turning(_dynamic(rope, base, size, length), 1.0)
    if kind not in stretched:
        raise ValueError(f"`{kind}` is no RoPE of the engine")
    return Turning(tuple(stretched[kind](x, rope) for x in plain), 1.0)


def sglang_turning(layers: Mapping[str, Any]) -> Turning:
    """What SGLang computes with: as vLLM, but for these keys.

    Raises:
        ValueError: It would refuse the RoPE, or choose one by the lengths at hand.
    """
    rope, length = dict(layers["rope_parameters"]), layers["max_position_embeddings"]
    kind = rope.get("rope_type", "default")
    if kind == "dynamic" and "alpha" not in rope:
        rope["max_trained_positions"] = length / rope["factor"]
    if kind == "yarn":
        rope.pop("attention_factor", None)
        turning = vllm_turning({**layers, "rope_parameters": rope})
        return Turning(turning.frequencies, turning.scale * rope.get("attn_factor", 1.0))
    if kind == "longrope":
        is_long = length > rope["original_max_position_embeddings"]
        if is_long and rope["short_factor"] != rope["long_factor"]:
            raise ValueError("short sequences are turned by its `short_factor`")
    return vllm_turning({**layers, "rope_parameters": rope})


def _dynamic(rope: Mapping[str, Any], base: float, size: int, length: int) -> tuple[float, ...]:
    power = size / (size - 2)
    if "alpha" in rope:
        base *= rope["alpha"] ** power
    else:
        factor = rope["factor"]
        stretch = factor * length / rope.get("max_trained_positions", length) - (factor - 1)
        base *= stretch**power
    return tuple(base ** -(i / size) for i in range(0, size, 2))


def _linear(frequency: float, rope: Mapping[str, Any]) -> float:
    if not isinstance(rope["factor"], float):
        raise ValueError("`factor` is not written as a decimal number")
    return float(frequency / rope["factor"])


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return float(frequency * (kept + (1 - kept) / rope["factor"]))


def _yarn(plain: list[float], rope: Mapping[str, Any], base: float, size: int) -> tuple[float, ...]:
    def pair_of(turns: float) -> float:
        length = rope["original_max_position_embeddings"]
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(rope.get("beta_fast", 32)), pair_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    found = []
    for i, frequency in enumerate(plain):
        scaled = min(max((i - low) / width, 0.0), 1.0)
        found.append(frequency * (1 - scaled + scaled / rope["factor"]))
    return tuple(found)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    def scale_of(weight: float) -> float:
        factor = rope["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale_of(rope["mscale"]) / scale_of(rope["mscale_all_dim"])
    return scale_of(1.0)


def _longrope(plain: list[float], rope: Mapping[str, Any], length: int) -> Turning:
    original = rope["original_max_position_embeddings"]
    chosen = "long" if length > original else "short"
    ratio = length / original
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    factors = rope[f"{chosen}_factor"]
    if len(factors) != len(plain):
        raise ValueError(f"`{chosen}_factor` has {len(factors)} values for {len(plain)} pairs")
    frequencies = tuple(x / factor for x, factor in zip(plain, factors, strict=True))
    return Turning(frequencies, rope.get(f"{chosen}_mscale", scale))
