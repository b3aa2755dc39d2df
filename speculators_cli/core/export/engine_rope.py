"""The RoPE that a serving engine applies, from the values written in config.json only.

Implemented a second time, from how the engines read each key: exports are checked against it,
because the training code cannot find a key that it does not read.
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
class EngineRope:
    """Radians per position for each pair of a head, and the factor of cosine and sine."""

    frequencies: tuple[float, ...]
    scale: float

    def is_close(self, other: "EngineRope") -> bool:
        """Whether both are equal up to rounding."""
        pairs = zip(self.frequencies, other.frequencies, strict=False)
        return (
            len(self.frequencies) == len(other.frequencies)
            and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs)
            and math.isclose(self.scale, other.scale, rel_tol=TOLERANCE)
        )


def find_rope_problem(
    layers: Mapping[str, Any],
    config: DecoderConfig,
    applied: Callable[[Mapping[str, Any]], EngineRope],
) -> str | None:
    """Return why an engine would apply another RoPE than in training; None if it would not.

    Args:
        layers: The values of decoder layers in the written config.json.
        config: The config of the trained draft.
        applied: Computes the engine's RoPE from the layers.
    """
    kind = config.rope_parameters["rope_type"]
    try:
        served = applied(layers)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"its `{kind}` RoPE is not supported by the engine: {error}"
    if served.is_close(trained_rope(config)):
        return None
    return f"its `{kind}` RoPE as the engine computes it is not the one it was trained with"


def trained_rope(config: DecoderConfig) -> EngineRope:
    """The RoPE that a draft was trained with."""
    frequencies, scale = find_frequencies(config)
    return EngineRope(tuple(frequencies.tolist()), scale)
