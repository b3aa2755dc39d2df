"""Answers with given counts."""

from collections.abc import Sequence

from speculators_cli.core.evaluation.draft_and_verify import Answer


def make_answer(
    num_accepted: Sequence[int],
    *,
    num_prompt_tokens: int = 1,
    refused_for: Sequence[int | None] | None = None,
) -> Answer:
    """An answer with these draft tokens accepted per pass."""
    num_tokens = 1 + sum(count + 1 for count in num_accepted)
    return Answer(
        num_prompt_tokens=num_prompt_tokens,
        tokens=tuple(range(num_tokens)),
        is_accepted=(False,) * num_tokens,
        num_accepted=tuple(num_accepted),
        refused_for=tuple(refused_for or [None] * len(num_accepted)),
    )
