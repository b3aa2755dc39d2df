"""Bootstrap intervals of acceptance lengths: prompts are drawn again, with replacement."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.evaluation.draft_and_verify import Answer

NUM_RESAMPLES = 2_000
COVERAGE = 0.95
RESAMPLES_AT_ONCE = 100

Interval = tuple[float, float]


def length_interval(answers: Sequence[Answer], *, seed: int) -> Interval | None:
    """Return the 95 % interval of the acceptance length; None for fewer than two prompts.

    Passes of one prompt resemble each other, so prompts are drawn, not passes.
    """
    if len(answers) < 2:
        return None
    return _bounds(_lengths(answers, seed))


def difference_interval(
    answers: Sequence[Answer], others: Sequence[Answer], *, seed: int
) -> Interval | None:
    """Return the 95 % interval of how much longer the first draft's acceptance length is.

    Both drafts answered the same prompts: each draw takes the same prompts of both.
    """
    assert len(answers) == len(others)
    if len(answers) < 2:
        return None
    return _bounds(_lengths(answers, seed) - _lengths(others, seed))


def _lengths(answers: Sequence[Answer], seed: int) -> NDArray[np.float64]:
    """Acceptance lengths of the resamples; [resamples]."""
    accepted = np.array([sum(answer.num_accepted) for answer in answers], np.float64)
    passes = np.array([len(answer.num_accepted) for answer in answers], np.float64)
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = generator.integers(len(answers), size=(RESAMPLES_AT_ONCE, len(answers)))
        num_passes = passes[drawn].sum(axis=1)
        parts.append(1 + accepted[drawn].sum(axis=1) / np.maximum(num_passes, 1))
    return np.concatenate(parts)


def _bounds(values: NDArray[np.float64]) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
