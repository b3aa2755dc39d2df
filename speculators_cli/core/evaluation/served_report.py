"""ServedReport: what a serving engine counted, and how fast it was."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from speculators_cli.core.engines.measured import MeasuredRun


@dataclass(frozen=True)
class Throughput:
    """Tokens per second with so many requests at a time, of each repeat."""

    concurrency: int
    with_draft: tuple[float, ...]
    without_draft: tuple[float, ...] | None  # None: not measured

    @property
    def speedup(self) -> float | None:
        """Median with the draft over median without."""
        if self.without_draft is None:
            return None
        return median(self.with_draft) / max(median(self.without_draft), 1e-9)

    @property
    def speedup_range(self) -> tuple[float, float] | None:
        """The slowest repeat with the draft over the fastest without, and the reverse."""
        if self.without_draft is None:
            return None
        fastest, slowest = max(self.without_draft), min(self.without_draft)
        return min(self.with_draft) / max(fastest, 1e-9), max(self.with_draft) / max(slowest, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        alone, spread = self.without_draft, self.speedup_range
        return {
            "concurrency": self.concurrency,
            "tokens_per_second": list(self.with_draft),
            "tokens_per_second_without_draft": None if alone is None else list(alone),
            "speedup": self.speedup,
            "speedup_range": None if spread is None else list(spread),
        }


@dataclass(frozen=True)
class ServedReport:
    """What a draft reached in an engine. The engine has no counts by prompt, so no interval."""

    draft: str
    verifier: str
    prompts: str
    num_bad_rows: int
    num_too_long: int  # prompts
    max_new_tokens: int
    temperature: float
    engine: Mapping[str, str]  # its name and versions
    counted: MeasuredRun  # with the draft, over all prompts once
    num_different: int | None  # answers that differ from those without a draft
    throughputs: tuple[Throughput, ...]
    min_acceptance_length: float | None
    duration_seconds: float

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Fraction of passes that accepted token k and all before it."""
        return tuple(count / self.counted.num_passes for count in self.counted.num_accepted)

    @property
    def conditional_acceptance_rates(self) -> tuple[float | None, ...]:
        """Of the passes that accepted all tokens before k, the fraction that accepted token k."""
        counts = (self.counted.num_passes, *self.counted.num_accepted)
        return tuple(after / before if before else None for before, after in pairwise(counts))

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verifier pass, including the bonus token."""
        return 1.0 + sum(self.acceptance_rates)

    @property
    def is_long_enough(self) -> bool:
        """Whether `--min-acceptance-length` is reached."""
        least = self.min_acceptance_length
        return least is None or self.acceptance_length >= least

    def to_json(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        different = self.num_different
        return {
            "draft": self.draft,
            "verifier": self.verifier,
            "prompts": self.prompts,
            "num_prompts": len(self.counted.answers),
            "num_bad_rows": self.num_bad_rows,
            "num_too_long_prompts": self.num_too_long,
            "num_speculative_tokens": len(self.counted.num_accepted),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "engine": dict(self.engine),
            "num_passes": self.counted.num_passes,
            "num_accepted": list(self.counted.num_accepted),
            "num_answer_tokens": sum(map(len, self.counted.answers)),
            "acceptance_length": self.acceptance_length,
            "acceptance_length_interval": None,
            "acceptance_rates": list(self.acceptance_rates),
            "conditional_acceptance_rates": list(self.conditional_acceptance_rates),
            "is_lossless": None if different is None else different == 0,
            "num_different_answers": different,
            "throughput": [x.to_json() for x in self.throughputs],
            "min_acceptance_length": self.min_acceptance_length,
            "duration_seconds": self.duration_seconds,
        }
