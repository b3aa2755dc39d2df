"""Questions: the prompts that a draft is evaluated on, as token ids of the verifier."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from speculators_cli.core.conversations.bad_rows import BadRow, BadRows
from speculators_cli.core.conversations.chat_template import RenderError
from speculators_cli.core.conversations.prompt_files import open_prompts, read_prompts
from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.conversations.prompts import (
    BadRowError,
    Conversation,
    GivenTokens,
    RawPrompt,
    Source,
)
from speculators_cli.core.errors import DataError
from speculators_cli.core.evaluation.prompt_sets import PROMPT_SETS, read_prompt_set
from speculators_cli.settings.evaluate import PromptSettings


@dataclass(frozen=True)
class Question:
    """One prompt."""

    index: int  # row of the input
    ids: tuple[int, ...]
    category: str | None
    source: Source


@dataclass(frozen=True)
class Questions:
    """All prompts, and how many rows were left out."""

    questions: tuple[Question, ...]
    num_bad_rows: int
    num_too_long: int


def read_questions(
    given: PromptSettings, renderer: PromptRenderer, *, vocab_size: int, max_tokens: int
) -> Questions:
    """Read prompts and render them.

    Args:
        given: The input.
        renderer: Makes token ids.
        vocab_size: Upper limit of given token ids.
        max_tokens: Maximum length of a prompt.

    Raises:
        SettingsError: The input is neither a path nor the name of a data set.
        DataError: The input cannot be read, or has no usable prompt.
        MachineError: A package is missing, or the hub is unreachable.
    """
    assert given.prompts is not None, "the settings require them"
    bad = BadRows(given.max_bad_rows)
    questions, num_too_long = [], 0
    for source in islice(_read_sources(given.prompts, bad, vocab_size), given.max_prompts):
        try:
            ids = _render(source, renderer)
        except (BadRowError, RenderError) as error:
            bad.num_rows -= 1  # it was counted as a good one
            bad.add(BadRow(f"{given.prompts}, row {source.index + 1:,}", str(error)))
            continue
        if len(ids) > max_tokens:
            num_too_long += 1
        else:
            questions.append(Question(source.index, tuple(ids), source.category, source))
    bad.check()
    if not questions:
        longer = f", and {num_too_long:,} are longer than {max_tokens:,} tokens"
        raise DataError(
            f"`{given.prompts}` has no prompt to answer: {bad.num_bad:,} of {bad.num_rows:,} rows "
            f"cannot be used{longer if num_too_long else ''}",
            hint="Pass other prompts, or a lower `--max-new-tokens`"
            if num_too_long
            else "Pass rows with `prompt` or `messages`",
        )
    return Questions(tuple(questions), bad.num_bad, num_too_long)


def _read_sources(name: str, bad: BadRows, vocab_size: int) -> Iterator[Source]:
    if name not in PROMPT_SETS:
        yield from read_prompts(open_prompts(name), bad, vocab_size=vocab_size)
        return
    for prompt in read_prompt_set(name):
        bad.add_good()
        yield prompt


def _render(source: Source, renderer: PromptRenderer) -> list[int]:
    """The prompt of a row: all before its last answer.

    Raises:
        BadRowError: The row has no prompt.
        RenderError: The chat template rejects it.
    """
    if isinstance(source, RawPrompt):
        return renderer.render_raw(source)
    if isinstance(source, Conversation):
        messages = list(source.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] == "user" for message in messages):
            raise BadRowError("has no user message before its answer")
        return renderer.render(messages, source.tools)
    if isinstance(source, GivenTokens):
        start = int(np.flatnonzero(source.loss_mask[1:])[0]) + 1
        ids: list[int] = source.input_ids[:start].tolist()
        return ids
    raise BadRowError("has a `text`, in which no prompt is marked")
