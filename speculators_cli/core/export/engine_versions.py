"""Which releases of vLLM read which drafts: what `tests/vllm/try_versions.py` measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.algorithms.draft_config import DraftConfig

# The oldest and newest release whose counts were those of this package, for a default draft.
OLDEST_TRIED, NEWEST_TRIED = "0.22.0", "0.32.0"


@dataclass(frozen=True)
class _Need:
    """A part of a draft that releases tried before `since` do not read."""

    has_it: Callable[[Any], bool]
    since: str
    before: str  # what older ones do, as the end of a sentence


# What goes wrong without a word stands first.
_NEEDS = (
    _Need(
        lambda config: config.norm_output,
        "0.25.0",
        "ignore its `norm_output`, and accept fewer tokens without a word",
    ),
    _Need(lambda config: config.fc_norm, "0.25.0", "do not load its `fc_norm`"),
    _Need(lambda config: config.arch == "qwen3", "0.25.0", "do not load its qwen3 layers"),
)


@dataclass(frozen=True)
class EngineAdvice:
    """The release of vLLM that a draft is for."""

    oldest: str
    sentence: str


def advise(config: DraftConfig) -> EngineAdvice:
    """The oldest release that was seen to read all of a draft."""
    needs = [need for need in _NEEDS if need.has_it(config)]
    if not needs:
        return EngineAdvice(OLDEST_TRIED, f"Tried with vLLM {OLDEST_TRIED} to {NEWEST_TRIED}.")
    oldest = max((need.since for need in needs), key=_numbers)
    reasons = "; they ".join(need.before for need in needs)
    return EngineAdvice(oldest, f"Needs vLLM {oldest} or newer: older ones {reasons}.")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
