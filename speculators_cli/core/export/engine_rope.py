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
