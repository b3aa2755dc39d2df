"""Bootstrap intervals against normal theory, and against the data that they resample."""

import numpy as np
import pytest

from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.intervals import difference_interval, length_interval
from tests.unit.evaluation.made_answers import make_answer


def draw_answers(num_prompts: int, rate: float, seed: int) -> list[Answer]:
    """Answers of 20 passes that each accept one token or none."""
    draws = np.random.default_rng(seed).random((num_prompts, 20)) < rate
    return [make_answer(row.astype(int).tolist()) for row in draws]


def test_an_interval_has_the_width_of_normal_theory() -> None:
    answers = draw_answers(100, 0.4, seed=0)

    interval = length_interval(answers, seed=0)

    assert interval is not None
    low, high = interval
    # 2,000 independent passes: 1.96 standard errors of 0.011 on each side. 2,000 resamples find
    # the quantiles to some 5 %, and the sample's own variance differs by as much.
    assert high - low == pytest.approx(2 * 1.96 * (0.4 * 0.6 / 2000) ** 0.5, rel=0.25)
    mean = 1 + sum(sum(a.num_accepted) for a in answers) / 2000
    assert low < mean < high


def test_intervals_cover_the_true_length_as_often_as_they_say() -> None:
    found = [length_interval(draw_answers(40, 0.4, seed), seed=seed) for seed in range(200)]

    covered = sum(x is not None and x[0] <= 1.4 <= x[1] for x in found)

    # 95 % of 200 is 190, with a standard deviation of 3.1; the bootstrap is a little narrow.
    assert 178 <= covered <= 199


def test_prompts_with_more_passes_weigh_more() -> None:
    answers = [make_answer([0] * 98), make_answer([2] * 2)]

    interval = length_interval(answers, seed=1)

    # One prompt drawn twice, or both: 1 + 4/100.
    assert interval == (1.0, 3.0)
    assert length_interval(answers, seed=1) == interval


def test_one_prompt_has_no_interval() -> None:
    assert length_interval([make_answer([1, 2])], seed=0) is None
    assert difference_interval([make_answer([1])], [make_answer([2])], seed=0) is None


def test_the_difference_is_paired_by_prompt() -> None:
    # Prompts differ widely, the drafts by the same on each of them.
    counts = [[k % 4] * 10 for k in range(40)]
    answers = [make_answer([x + 1 for x in row]) for row in counts]
    others = [make_answer(row) for row in counts]

    difference = difference_interval(answers, others, seed=0)
    single = length_interval(answers, seed=0)

    assert difference == pytest.approx((1.0, 1.0))
    assert single is not None
    assert single[1] - single[0] > 0.5
