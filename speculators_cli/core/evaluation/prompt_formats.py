"""Other formats of the same prompts: a draft may have been trained on one of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.conversations.chat_template import RenderError
from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.conversations.prompts import Conversation, Message, RawPrompt
from speculators_cli.core.engines.engine import Prompt
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.evaluation.diagnosis import Cause, weigh
from speculators_cli.core.evaluation.draft_and_verify import Answer, draft_and_verify
from speculators_cli.core.evaluation.forced_drafting import MAX_ANSWERS
from speculators_cli.core.evaluation.measurement import Work
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.evaluation.verifier import LoadedVerifier
from speculators_cli.core.progress import Progress


@dataclass(frozen=True)
class _Format:
    """A way to make token ids of a prompt."""

    change: str
    thinking: bool | None
    has_template: bool = True
    empties_system: bool = False


FORMATS = (
    _Format("without the chat template", None, has_template=False),
    _Format("with an empty system prompt", None, empties_system=True),
    _Format("thinking mode on", thinking=True),
    _Format("thinking mode off", thinking=False),
)


def try_formats(
    verifier: LoadedVerifier,
    drafter: Drafter,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    work: Work,
    *,
    seed: int,
    progress: Progress,
) -> Iterator[Cause]:
    """Draft and verify answers to the first prompts in other formats.

    Args:
        verifier: The verifier.
        drafter: The draft.
        questions: The prompts.
        answers: To these prompts, drafted and verified as they are.
        work: How answers are generated.
        seed: Of the intervals.
        progress: Reports finished answers.
    """
    pairs = [pair for pair in zip(questions, answers, strict=True) if pair[1].num_accepted]
    pairs = pairs[:MAX_ANSWERS]
    seen = [[question.ids for question, _ in pairs]]
    for form in FORMATS:
        ids = [_render(question, form, verifier) for question, _ in pairs]
        known = [x for x in ids if x is not None]
        if len(known) < len(ids) or known in seen:
            continue
        seen.append(known)
        found = draft_and_verify(
            verifier.rows,
            drafter,
            [Prompt(x, prompt.seed) for x, prompt in zip(known, work.prompts, strict=False)],
            work.sampling,
            end_ids=verifier.tokens.end_ids,
            batch_size=work.batch_size,
            progress=progress,
        ).answers
        base = [answer for _, answer in pairs]
        yield weigh("prompt format", form.change, found, base, seed=seed)


def _render(question: Question, form: _Format, verifier: LoadedVerifier) -> tuple[int, ...] | None:
    """Token ids of a prompt in a format; None if it cannot have it."""
    source, tokens = question.source, verifier.tokens
    renderer = PromptRenderer(
        tokens.tokenizer, thinking=form.thinking, vocab_size=tokens.vocab_size
    )
    if renderer.template.is_missing or not isinstance(source, RawPrompt | Conversation):
        return None
    messages: list[Message] = (
        [{"role": "user", "content": source.text}]
        if isinstance(source, RawPrompt)
        else [*source.messages]
    )
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not form.has_template:
        return tuple(verifier.encode("\n\n".join(_text_of(message) for message in messages)))
    if form.empties_system:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": ""}, *others]
    tools = source.tools if isinstance(source, Conversation) else None
    try:
        return tuple(renderer.render(messages, tools))
    except (RenderError, SettingsError):  # a template without a system prompt, for example
        return None


def _text_of(message: Any) -> str:
    return str(message.get("content") or "")
