"""Predicted speedup: acceptance lengths and times of single passes, for each number of tokens."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from speculators_cli.core.algorithms.drafter import Drafter, Verified
from speculators_cli.core.engines.row_verifier import RowVerifier
from speculators_cli.core.evaluation.draft_and_verify import wait_for_device

NUM_REPEATS = 5  # timed, of each pass
NUM_WARMUPS = 2


@dataclass(frozen=True)
class Speedups:
    """Speedup over the verifier alone, for one request at a time, for 1, 2, ... draft tokens."""

    predicted: tuple[float, ...]

    @property
    def best(self) -> int:
        """The number of draft tokens with the highest speedup."""
        return max(range(len(self.predicted)), key=lambda k: self.predicted[k]) + 1


def predict_speedups(
    acceptance_rates: Sequence[float],
    verify_seconds: Sequence[float],
    draft_seconds: Sequence[float],
) -> Speedups:
    """Predict from measured rates and times.

    The first k tokens of a chain do not depend on later ones: with k draft tokens, a pass accepts
    as many of them as were accepted of the first k of a longer chain.

    Args:
        acceptance_rates: Of draft token 1, 2, ..., K, including all before it.
        verify_seconds: Of a verifier pass over 1, 2, ..., K + 1 tokens.
        draft_seconds: Of drafting 1, 2, ..., K tokens.
    """
    predicted = []
    for k in range(1, len(acceptance_rates) + 1):
        length = 1 + sum(acceptance_rates[:k])
        seconds = verify_seconds[k] + draft_seconds[k - 1]
        predicted.append(length * verify_seconds[0] / seconds)
    return Speedups(tuple(predicted))


def time_verifier(rows: RowVerifier, prompt: Sequence[int], num_draft_tokens: int) -> list[float]:
    """Time passes over 1, 2, ..., K + 1 tokens after a prompt, of one row; in seconds."""
    rows.start(1, len(prompt) + num_draft_tokens + 1)
    rows.read(0, prompt)
    seconds = []
    for num_new in range(1, num_draft_tokens + 2):
        tokens = torch.tensor([list(prompt[:1]) * num_new], device=rows.device)
        seconds.append(_time(lambda tokens=tokens: rows.extend(tokens, [len(prompt)])))  # type: ignore[misc]
    return seconds


def time_drafter(drafter: Drafter, rows: RowVerifier, prompt: Sequence[int]) -> float:
    """Time taking in the tokens of a pass, and drafting, of one row; in seconds."""
    num_draft_tokens = drafter.num_draft_tokens
    num_new = num_draft_tokens + 1
    rows.start(1, len(prompt))
    out = rows.read(0, prompt)
    drafter.start(1, len(prompt) + 2 * num_new)
    ids = torch.tensor([list(prompt)], device=rows.device)
    drafter.read(Verified(ids, out.aux, [0], [len(prompt)], row=0))
    tokens = ids[:, -1:].repeat(1, num_new)
    aux = out.aux[:, -1:].repeat(1, num_new, 1)
    verified = Verified(tokens, aux, [len(prompt)], [num_new])

    def draft() -> None:
        drafter.read(verified)
        drafter.propose()

    return _time(draft)


def fill_between(first: float, last: float, count: int) -> list[float]:
    """Times of drafting 1, 2, ..., `count` tokens: each token of a chain takes the same time."""
    if count == 1:
        return [first]
    step = max(last - first, 0.0) / (count - 1)
    return [first + step * k for k in range(count)]


def _time(run: Callable[[], object]) -> float:
    """Median seconds of a call."""
    for _ in range(NUM_WARMUPS):
        run()
    seconds = []
    for _ in range(NUM_REPEATS):
        wait_for_device()
        started_at = time.perf_counter()
        run()
        wait_for_device()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)
