"""Figures of a report, counted by hand."""

import pytest
import torch

from speculators_cli.core.conversations.prompts import RawPrompt
from speculators_cli.core.evaluation.draft_and_verify import Answer, PassTimes
from speculators_cli.core.evaluation.measurement import Measurement
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.evaluation.report import (
    compare,
    count_categories,
    count_context_lengths,
    share_refused_outside,
)
from speculators_cli.core.evaluation.speedup import fill_between, predict_speedups
from tests.unit.evaluation.made_answers import make_answer


def make_measurement(*answers: Answer) -> Measurement:
    return Measurement(
        num_draft_tokens=3,
        answers=answers,
        num_different=0,
        times=PassTimes(1, 1.0, 1.0),
        duration_seconds=1.0,
    )


def test_rates_are_shares_of_all_passes_or_of_those_that_got_so_far() -> None:
    found = make_measurement(make_answer([0, 1, 3]), make_answer([3, 1]))

    assert found.num_passes == 5
    assert found.num_accepted == (4, 2, 2)
    assert found.acceptance_rates == (0.8, 0.4, 0.4)
    assert found.conditional_acceptance_rates == (0.8, 0.5, 1.0)
    assert found.acceptance_length == 1 + 8 / 5


def test_a_rate_that_no_pass_reached_is_unknown() -> None:
    found = make_measurement(make_answer([0, 1]))

    assert found.conditional_acceptance_rates == (0.5, 0.0, None)


def test_categories_are_counted_apart() -> None:
    names = ("code", "math", "code", None)
    questions = [Question(i, (1,), name, RawPrompt(i, "One?")) for i, name in enumerate(names)]
    answers = [make_answer(counts) for counts in ([1, 1], [0], [3], [3, 3])]

    code, math = count_categories(questions, answers, seed=0)

    assert (code.name, code.num_prompts, code.num_passes) == ("code", 2, 3)
    assert code.acceptance_length == pytest.approx(1 + 5 / 3)
    assert (math.name, math.num_passes, math.acceptance_length) == ("math", 1, 1.0)
    assert code.interval is not None
    assert math.interval is None


def test_a_pass_belongs_to_the_length_at_which_it_begins() -> None:
    # 126 tokens and the first of the answer; then 127 + 1, 128 + 4.
    short, longer = count_context_lengths([make_answer([0, 3, 1], num_prompt_tokens=126)])

    assert (short.min_tokens, short.max_tokens) == (0, 128)
    assert (short.num_passes, short.acceptance_length) == (1, 1.0)
    assert (longer.min_tokens, longer.max_tokens) == (128, 256)
    assert (longer.num_passes, longer.acceptance_length) == (2, 3.0)


def test_refusals_outside_the_draft_vocabulary_are_a_share_of_refusals() -> None:
    t2d = torch.tensor([True, False, True, False])
    answers = [make_answer([0, 1, 3], refused_for=[1, 2, None]), make_answer([0], refused_for=[3])]

    assert share_refused_outside(answers, t2d) == pytest.approx(2 / 3)
    assert share_refused_outside([make_answer([3])], t2d) is None


@pytest.mark.parametrize(
    ("counts", "verdict"), [([3, 3, 2], "longer"), ([0, 0, 0], "shorter"), ([1, 2, 1], "undecided")]
)
def test_a_difference_is_real_if_its_interval_has_one_sign(counts: list[int], verdict: str) -> None:
    others = [make_answer([1, 2, 1]), make_answer([2, 1, 1])] * 5
    mine = make_measurement(*(make_answer(counts) for _ in others))

    found = compare("other", mine, make_measurement(*others), seed=0)

    assert found.verdict == verdict
    assert found.difference == pytest.approx(mine.acceptance_length - (1 + 8 / 6))


def test_speedup_is_tokens_per_time_over_the_verifier_alone() -> None:
    found = predict_speedups((0.8, 0.5), (10.0, 11.0, 13.0), (2.0, 5.0))

    assert found.predicted == pytest.approx((1.8 * 10 / 13, 2.3 * 10 / 18))
    assert found.best == 1
    assert predict_speedups((0.8, 0.7), (10.0, 11.0, 12.0), (1.0, 2.0)).best == 2


def test_each_token_of_a_chain_takes_the_same_time() -> None:
    assert fill_between(2.0, 5.0, 4) == [2.0, 3.0, 4.0, 5.0]
    assert fill_between(2.0, 2.0, 1) == [2.0]
