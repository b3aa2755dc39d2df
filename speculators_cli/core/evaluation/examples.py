"""Examples: the text of a few answers, with the accepted draft tokens marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.models.verifier_tokens import VerifierTokens

NUM_EXAMPLES = 6
MAX_PROMPT_CHARS = 600

Marked = tuple[tuple[str, bool], ...]  # spans of text, and whether each was drafted


@dataclass(frozen=True)
class Example:
    """One answer as text."""

    prompt: str  # its end
    category: str | None
    acceptance_length: float
    answer: Marked


def choose_examples(
    questions: Sequence[Question], answers: Sequence[Answer], tokens: VerifierTokens
) -> tuple[Example, ...]:
    """Choose answers between the least and the most accepted ones."""
    pairs = [pair for pair in zip(questions, answers, strict=True) if pair[1].num_accepted]
    pairs.sort(key=lambda pair: _acceptance_length(pair[1]))
    count = min(NUM_EXAMPLES, len(pairs))
    places = [round(i * (len(pairs) - 1) / max(count - 1, 1)) for i in range(count)]
    return tuple(_show(*pairs[place], tokens) for place in places)


def mark_answer(answer: Answer, tokens: VerifierTokens) -> Iterator[tuple[str, bool]]:
    """Split an answer into spans of text, and whether each was drafted."""
    pairs = zip(answer.tokens, answer.is_accepted, strict=True)
    shown = [pair for pair in pairs if pair[0] not in tokens.end_ids]
    ids: list[int] = []
    start = 0
    for is_accepted, run in groupby(shown, key=lambda pair: pair[1]):
        ids += [token for token, _ in run]
        # Of the whole answer so far: a span alone may begin within a character or lose a space.
        text = tokens.tokenizer.decode(ids)
        end = len(text.rstrip("\N{REPLACEMENT CHARACTER}")) if len(ids) < len(shown) else len(text)
        if end > start:
            yield text[start:end], is_accepted
            start = end


def _show(question: Question, answer: Answer, tokens: VerifierTokens) -> Example:
    prompt = str(tokens.tokenizer.decode(list(question.ids)))
    return Example(
        prompt=prompt if len(prompt) <= MAX_PROMPT_CHARS else f"...{prompt[-MAX_PROMPT_CHARS:]}",
        category=question.category,
        acceptance_length=_acceptance_length(answer),
        answer=tuple(mark_answer(answer, tokens)),
    )


def _acceptance_length(answer: Answer) -> float:
    return 1.0 + sum(answer.num_accepted) / len(answer.num_accepted)
