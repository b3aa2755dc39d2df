"""EvaluationReport: what `evaluate` measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from speculators_cli.core.evaluation.diagnosis import Diagnosis
from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.intervals import (
    Interval,
    difference_interval,
    length_interval,
)
from speculators_cli.core.evaluation.measurement import Measurement
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.evaluation.speedup import Speedups
from speculators_cli.settings.evaluate import MAX_DRAFT_TOKENS

# Context lengths, in tokens, from which on passes are counted apart.
CONTEXT_BOUNDS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Category:
    """The prompts of one category."""

    name: str
    num_prompts: int
    num_passes: int
    acceptance_length: float
    interval: Interval | None


@dataclass(frozen=True)
class ContextLength:
    """The passes that began within a range of positions."""

    min_tokens: int
    max_tokens: int | None  # exclusive
    num_passes: int
    acceptance_length: float


@dataclass(frozen=True)
class Comparison:
    """How much longer the acceptance length is than another draft's, on the same prompts."""

    draft: str
    acceptance_length: float  # the other draft's
    difference: float
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """`longer` or `shorter` than the other draft's, or `undecided`."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "undecided"
        return "longer" if self.difference > 0 else "shorter"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "draft": self.draft,
            "acceptance_length": self.acceptance_length,
            "difference": self.difference,
            "difference_interval": _as_list(self.interval),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class EvaluationReport:
    """What a draft reached; the interval is a 95 % bootstrap interval over prompts."""

    draft: str
    verifier: str
    prompts: str
    num_bad_rows: int
    num_too_long: int  # prompts
    max_new_tokens: int
    temperature: float
    dtype: str
    device: str
    batch_size: int
    measured: Measurement
    interval: Interval | None
    categories: tuple[Category, ...]
    context_lengths: tuple[ContextLength, ...]
    refused_outside_vocab: float | None  # share of refusals; None: nothing was refused
    speedups: Speedups
    peak_memory_bytes: int | None  # None on a CPU
    against: Comparison | None
    diagnosis: Diagnosis | None
    min_acceptance_length: float | None
    duration_seconds: float

    @property
    def is_long_enough(self) -> bool:
        """Whether `--min-acceptance-length` is reached."""
        least = self.min_acceptance_length
        return least is None or self.measured.acceptance_length >= least

    def to_json(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        found, num_passes = self.measured, max(self.measured.times.num_passes, 1)
        predicted = [*self.speedups.predicted, *[None] * MAX_DRAFT_TOKENS][:MAX_DRAFT_TOKENS]
        return {
            "draft": self.draft,
            "verifier": self.verifier,
            "prompts": self.prompts,
            "num_prompts": len(found.answers),
            "num_bad_rows": self.num_bad_rows,
            "num_too_long_prompts": self.num_too_long,
            "num_speculative_tokens": found.num_draft_tokens,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "dtype": self.dtype,
            "device": self.device,
            "batch_size": self.batch_size,
            "num_passes": found.num_passes,
            "num_answer_tokens": sum(len(answer.tokens) for answer in found.answers),
            "acceptance_length": found.acceptance_length,
            "acceptance_length_interval": _as_list(self.interval),
            "acceptance_rates": list(found.acceptance_rates),
            "conditional_acceptance_rates": list(found.conditional_acceptance_rates),
            "categories": [
                {
                    "category": x.name,
                    "num_prompts": x.num_prompts,
                    "num_passes": x.num_passes,
                    "acceptance_length": x.acceptance_length,
                    "acceptance_length_interval": _as_list(x.interval),
                }
                for x in self.categories
            ],
            "context_lengths": [
                {
                    "min_tokens": x.min_tokens,
                    "max_tokens": x.max_tokens,
                    "num_passes": x.num_passes,
                    "acceptance_length": x.acceptance_length,
                }
                for x in self.context_lengths
            ],
            "refused_outside_draft_vocab": self.refused_outside_vocab,
            "is_lossless": found.is_lossless,
            "num_different_answers": found.num_different,
            "draft_seconds_per_pass": found.times.draft_seconds / num_passes,
            "verify_seconds_per_pass": found.times.verify_seconds / num_passes,
            "predicted_speedup": predicted,
            "best_num_speculative_tokens": self.speedups.best,
            "peak_memory_bytes": self.peak_memory_bytes,
            "against": None if self.against is None else self.against.to_json(),
            "diagnosis": None if self.diagnosis is None else self.diagnosis.to_json(),
            "min_acceptance_length": self.min_acceptance_length,
            "duration_seconds": self.duration_seconds,
        }


def compare(
    draft: str, found: Measurement, other: Measurement, *, seed: int
) -> Comparison:  # fmt: skip
    """Compare with another draft, prompt by prompt."""
    return Comparison(
        draft=draft,
        acceptance_length=other.acceptance_length,
        difference=found.acceptance_length - other.acceptance_length,
        interval=difference_interval(found.answers, other.answers, seed=seed),
    )


def count_categories(
    questions: Sequence[Question], answers: Sequence[Answer], *, seed: int
) -> tuple[Category, ...]:
    """Count the passes of each category; nothing if the prompts have none."""
    groups: dict[str, list[Answer]] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.category is not None:
            groups.setdefault(question.category, []).append(answer)
    return tuple(
        Category(
            name=name,
            num_prompts=len(group),
            num_passes=sum(len(answer.num_accepted) for answer in group),
            acceptance_length=_mean_length([x for answer in group for x in answer.num_accepted]),
            interval=length_interval(group, seed=seed),
        )
        for name, group in sorted(groups.items())
    )


def count_context_lengths(answers: Sequence[Answer]) -> tuple[ContextLength, ...]:
    """Count the passes by the number of tokens before them."""
    groups: dict[int, list[int]] = {}
    for answer in answers:
        num_tokens = answer.num_prompt_tokens + 1
        for count in answer.num_accepted:
            bound = max(i for i, low in enumerate(CONTEXT_BOUNDS) if low <= num_tokens)
            groups.setdefault(bound, []).append(count)
            num_tokens += count + 1
    return tuple(
        ContextLength(
            min_tokens=CONTEXT_BOUNDS[bound],
            max_tokens=CONTEXT_BOUNDS[bound + 1] if bound + 1 < len(CONTEXT_BOUNDS) else None,
            num_passes=len(counts),
            acceptance_length=_mean_length(counts),
        )
        for bound, counts in sorted(groups.items())
    )


def share_refused_outside(
    answers: Sequence[Answer],
    t2d: Tensor,  # [vocab], bool
) -> float | None:
    """Of the refused draft tokens, the fraction in place of one that no draft could propose."""
    refused = [x for answer in answers for x in answer.refused_for if x is not None]
    if not refused:
        return None
    return sum(not bool(t2d[token]) for token in refused) / len(refused)


def _mean_length(counts: Sequence[int]) -> float:
    return 1.0 + sum(counts) / max(len(counts), 1)


def _as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
