"""MeasuredEngine: a serving engine whose speed and counts of accepted tokens are measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from speculators_cli.core.engines.engine import Prompt, Sampling


@dataclass(frozen=True)
class MeasuredRun:
    """Answers to prompts; counts are the engine's own."""

    answers: tuple[tuple[int, ...], ...]  # in the order of the prompts
    seconds: float
    num_passes: int  # verifier passes over a chain of draft tokens; 0 without a draft
    num_accepted: tuple[int, ...]  # of them, those that accepted draft token k and all before it

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answers per second."""
        return sum(map(len, self.answers)) / max(self.seconds, 1e-9)


class MeasuredEngine(Protocol):
    """Answers prompts, with or without a draft."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The engine and its version."""

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, concurrency: int) -> MeasuredRun:
        """Answer prompts, so many at a time.

        Raises:
            DataError: The engine refuses a prompt.
            MachineError: It cannot be loaded, or has failed.
        """

    def close(self) -> None:
        """Release its memory and processes."""
