"""Answers as text: what is marked, and what a page shows of it."""

from typing import Any

import pytest

from speculators_cli.core.conversations.prompts import RawPrompt
from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.evaluation.draft_and_verify import Answer, PassTimes
from speculators_cli.core.evaluation.examples import Example, choose_examples, mark_answer
from speculators_cli.core.evaluation.html_page import build_page
from speculators_cli.core.evaluation.measurement import Measurement
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.evaluation.report import Category, EvaluationReport
from speculators_cli.core.evaluation.speedup import Speedups
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_tokens import VerifierTokens
from tests.unit.evaluation.made_answers import make_answer

END = 1


@pytest.fixture(scope="module")
def tokens() -> VerifierTokens:
    tokenizer = load_tokenizer(VerifierFiles(str(VERIFIER_DIR)), trust_remote_code=False)
    return VerifierTokens(tokenizer, frozenset({END}), 2048)


def answer_of(ids: list[int], accepted: list[bool]) -> Answer:
    return Answer(1, tuple(ids), tuple(accepted), (1,), (None,))


def test_spans_join_to_the_text_without_its_end_token(tokens: VerifierTokens) -> None:
    text = "def add(a, b):\n    return a + b"
    ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    accepted = [i % 3 == 1 for i in range(len(ids))]

    spans = list(mark_answer(answer_of([*ids, END], [*accepted, True]), tokens))

    assert "".join(text for text, _ in spans) == text
    first = tokens.tokenizer.decode(ids[:1])
    assert spans[0] == (first, False)
    assert spans[1] == (tokens.tokenizer.decode(ids[:2])[len(first) :], True)


def test_a_character_of_several_tokens_is_not_cut(tokens: VerifierTokens) -> None:
    text = "a\N{SNOWMAN}b"
    ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3

    spans = list(mark_answer(answer_of(ids, [i % 2 == 0 for i in range(len(ids))]), tokens))

    assert "".join(text for text, _ in spans) == text


def test_examples_are_between_the_least_and_the_most_accepted(tokens: VerifierTokens) -> None:
    counts = [3, 0, 1, 2, 3, 1, 0, 2, 1]
    answers = [make_answer([count]) for count in counts]
    questions = [Question(i, (5, 6), None, RawPrompt(i, "One?")) for i in range(len(counts))]

    found = choose_examples(questions, answers, tokens)

    lengths = [example.acceptance_length for example in found]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1], len(lengths)) == (1.0, 4.0, 6)
    assert choose_examples(questions[:1], answers[:1], tokens)[0].acceptance_length == 4.0


def make_report(**changes: Any) -> EvaluationReport:
    measured = Measurement(2, (make_answer([0, 2]),), 0, PassTimes(2, 1.0, 1.0), 1.0)
    fields: dict[str, Any] = {
        "draft": "some/<draft>",
        "verifier": "some/verifier",
        "prompts": "p.jsonl",
        "num_bad_rows": 0,
        "num_too_long": 0,
        "max_new_tokens": 8,
        "temperature": 0.0,
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 1,
        "measured": measured,
        "interval": None,
        "categories": (Category("<b>math</b>", 1, 2, 2.0, None),),
        "context_lengths": (),
        "refused_outside_vocab": None,
        "speedups": Speedups((1.2, 0.9)),
        "peak_memory_bytes": None,
        "against": None,
        "diagnosis": None,
        "min_acceptance_length": None,
        "duration_seconds": 1.0,
    }
    return EvaluationReport(**fields | changes)


def test_text_of_models_and_prompts_is_no_markup() -> None:
    spans = (("<i>own</i> ", False), ("\u202e<script>", True))
    page = build_page(make_report(), [Example("</pre><img>", "<u>", 2.0, spans)])

    assert "<mark>\\u202e&lt;script&gt;</mark>" in page
    assert "&lt;i&gt;own&lt;/i&gt; " in page
    for text in ("<img>", "<u>", "<b>math", "<draft>", "<script"):
        assert text not in page
    assert "2.00 tokens per verifier pass" in page
    assert "1.20x" in page
