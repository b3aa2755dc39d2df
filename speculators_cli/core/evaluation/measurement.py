"""Measurement: what a draft reached over prompts, counted pass by pass."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.evaluation.draft_and_verify import (
    Answer,
    DraftedAnswers,
    PassTimes,
    draft_and_verify,
)
from speculators_cli.core.evaluation.verifier import LoadedVerifier
from speculators_cli.core.progress import Progress


@dataclass(frozen=True)
class Measurement:
    """Counts over all prompts."""

    num_draft_tokens: int  # per chain
    answers: tuple[Answer, ...]
    num_different: int  # answers that differ from the verifier's own
    times: PassTimes
    duration_seconds: float

    @property
    def num_passes(self) -> int:
        """Verifier passes that checked a chain."""
        return sum(len(answer.num_accepted) for answer in self.answers)

    @property
    def num_accepted(self) -> tuple[int, ...]:
        """Passes that accepted draft token k and all before it."""
        counts = [count for answer in self.answers for count in answer.num_accepted]
        return tuple(sum(count > k for count in counts) for k in range(self.num_draft_tokens))

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Fraction of passes that accepted token k."""
        return tuple(count / max(self.num_passes, 1) for count in self.num_accepted)

    @property
    def conditional_acceptance_rates(self) -> tuple[float | None, ...]:
        """Of the passes that accepted all tokens before k, the fraction that accepted token k."""
        counts = (self.num_passes, *self.num_accepted)
        return tuple(after / before if before else None for before, after in pairwise(counts))

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verifier pass, including the bonus token."""
        return 1.0 + sum(self.num_accepted) / max(self.num_passes, 1)

    @property
    def is_lossless(self) -> bool:
        """Whether every answer equals the verifier's own, token by token."""
        return self.num_different == 0


@dataclass(frozen=True)
class Work:
    """The answers to generate, for every draft alike."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    batch_size: int  # maximum number of prompts computed together


def answer_alone(verifier: LoadedVerifier, work: Work, progress: Progress) -> DraftedAnswers:
    """Generate the verifier's own answers, one token per pass."""
    return _answer(verifier, None, work, progress)


def measure(
    verifier: LoadedVerifier,
    drafter: Drafter,
    work: Work,
    own: Sequence[Answer],
    *,
    progress: Progress,
) -> Measurement:
    """Draft and verify answers to prompts, and compare each with the verifier's own.

    Args:
        verifier: The verifier.
        drafter: The draft.
        work: The answers to generate.
        own: Those of `answer_alone`.
        progress: Reports finished answers.
    """
    started_at = time.perf_counter()
    drafted = _answer(verifier, drafter, work, progress)
    pairs = zip(drafted.answers, own, strict=True)
    return Measurement(
        num_draft_tokens=drafter.num_draft_tokens,
        answers=drafted.answers,
        num_different=sum(answer.tokens != other.tokens for answer, other in pairs),
        times=drafted.times,
        duration_seconds=time.perf_counter() - started_at,
    )


def _answer(
    verifier: LoadedVerifier, drafter: Drafter | None, work: Work, progress: Progress
) -> DraftedAnswers:
    return draft_and_verify(
        verifier.rows,
        drafter,
        work.prompts,
        work.sampling,
        end_ids=verifier.tokens.end_ids,
        batch_size=work.batch_size,
        progress=progress,
    )
