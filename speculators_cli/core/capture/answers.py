"""Answers of the verifier to the prompts of the input, turn by turn."""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from speculators_cli.core.capture.render import EngineTurn, Renderer
from speculators_cli.core.capture.rendered import (
    MAX_SHOWN_CHARS,
    PROMPT_TOO_LONG,
    TRUNCATED,
    LeftOut,
    Rendered,
    shorten,
)
from speculators_cli.core.capture.turns import describe_rejection, row_name
from speculators_cli.core.conversations.chat_template import RenderError
from speculators_cli.core.conversations.prompts import Conversation, Message, RawPrompt, Source
from speculators_cli.core.engines.engine import Answer, Answerer, Prompt, Sampling
from speculators_cli.core.engines.sampling import seed_of

# Harmony, the format of gpt-oss: a history has the text of each channel under a key of its own.
_CHANNEL = re.compile(
    r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?:<\|(?:end|return|call)\|>|$)", re.DOTALL
)

Script = Generator[list[Message], Message, None]  # yields a history, is sent the answer to it


@dataclass
class Dialogue:
    """The answers to one row of the input."""

    source: Conversation | RawPrompt
    script: Script | None = None  # None for a prompt without roles
    turns: list[EngineTurn] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    prompt: list[int] | None = None  # that is to be answered next

    @property
    def name(self) -> str:
        """Name of the row of the next answer."""
        return row_name(self.source.index, len(self.turns) + 1)


class Regeneration:
    """Replaces the answers of the input by the verifier's own.

    Args:
        renderer: Makes prompts and rows.
        answerer: Generates answers.
        tokenizer: Turns an answer into the message that later prompts contain.
        sampling: How answers are chosen.
        seed: Of all answers.
        max_tokens: Maximum length of a row.
        keeps_truncated: Whether answers without an end token are kept.
    """

    def __init__(
        self,
        renderer: Renderer,
        answerer: Answerer,
        tokenizer: Any,
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        keeps_truncated: bool,
    ) -> None:
        self._renderer = renderer
        self._answerer = answerer
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._seed = seed
        self._max_tokens = max_tokens
        self._keeps_truncated = keeps_truncated

    def answer_all(self, sources: Sequence[Source]) -> list[Rendered]:
        """Answer the prompts among sources, all of a turn together; others are kept."""
        dialogues = {
            index: self._start(source)
            for index, source in enumerate(sources)
            if isinstance(source, Conversation | RawPrompt)
        }
        while waiting := [x for x in dialogues.values() if x.prompt is not None]:
            prompts = [self._prompt_of(dialogue) for dialogue in waiting]
            for answer in self._answerer.answer(prompts, self._sampling):
                self._take(waiting[answer.index], answer)
        return [
            self._finish(dialogues[index]) if index in dialogues else self._renderer.rows_of(source)
            for index, source in enumerate(sources)
        ]

    def _start(self, source: Conversation | RawPrompt) -> Dialogue:
        dialogue = Dialogue(source)
        if isinstance(source, Conversation):
            dialogue.script = write_script(source.messages)
            self._advance(dialogue, None)
        else:
            self._ask(dialogue, source)
        return dialogue

    def _advance(self, dialogue: Dialogue, answer: Message | None) -> None:
        """Go on to the next prompt of a dialogue, if there is one."""
        script = dialogue.script
        if script is None:
            return
        try:
            history = next(script) if answer is None else script.send(answer)
        except StopIteration:
            return
        self._ask(dialogue, history)

    def _ask(self, dialogue: Dialogue, prompt: list[Message] | RawPrompt) -> None:
        """Make a prompt the next one, unless it cannot be answered."""
        try:
            if isinstance(prompt, RawPrompt):
                ids = self._renderer.prompts.render_raw(prompt)
            else:
                assert isinstance(dialogue.source, Conversation)
                ids = self._renderer.prompts.render(prompt, dialogue.source.tools)
        except RenderError as error:
            messages = prompt.messages if isinstance(prompt, RawPrompt) else prompt
            dialogue.left_out.append(describe_rejection(dialogue.name, error, messages))
            return
        if len(ids) >= self._max_tokens:
            text = shorten(self._tokenizer.decode(ids[-MAX_SHOWN_CHARS:]))
            dialogue.left_out.append(LeftOut(dialogue.name, PROMPT_TOO_LONG, text))
            return
        dialogue.prompt = ids

    def _prompt_of(self, dialogue: Dialogue) -> Prompt:
        assert dialogue.prompt is not None
        return Prompt(
            dialogue.prompt, seed_of(self._seed, dialogue.source.index, len(dialogue.turns))
        )

    def _take(self, dialogue: Dialogue, answer: Answer) -> None:
        prompt, dialogue.prompt = dialogue.prompt, None
        assert prompt is not None, "one answer per prompt"
        if answer.is_truncated and not self._keeps_truncated:
            text = self._tokenizer.decode(list(answer.ids))
            dialogue.left_out.append(LeftOut(dialogue.name, TRUNCATED, shorten(text)))
            return
        dialogue.turns.append(EngineTurn(prompt, answer.ids, answer.is_truncated))
        # A conversation does not go on after half an answer.
        if not answer.is_truncated:
            ids = [i for i in answer.ids if i not in self._renderer.end_ids]
            self._advance(dialogue, read_answer(self._tokenizer, ids))

    def _finish(self, dialogue: Dialogue) -> Rendered:
        if not dialogue.turns:
            return Rendered((), tuple(dialogue.left_out), num_turns=len(dialogue.left_out))
        rendered = self._renderer.join(dialogue.source.index, dialogue.turns)
        return replace(
            rendered,
            left_out=(*rendered.left_out, *dialogue.left_out),
            num_turns=rendered.num_turns + len(dialogue.left_out),
        )


def write_script(messages: Sequence[Message]) -> Script:
    """Yield the histories to answer, in which answers are those that were sent.

    Answers of the input are replaced, except tool calls: the results that follow belong to them.
    """
    history: list[Message] = []
    for message in messages:
        if message["role"] != "assistant" or message.get("tool_calls"):
            history.append(message)
        elif _is_open(history):
            history.append((yield list(history)))
    if _is_open(history):
        yield history


def _is_open(history: Sequence[Message]) -> bool:
    return bool(history) and history[-1]["role"] in ("user", "tool")


def read_answer(tokenizer: Any, ids: Sequence[int]) -> Message:
    """Return an answer as a message for the prompts that follow it.

    Special tokens are kept as text: in some tokenizers those around thoughts are special, which
    chat templates look for to leave thoughts out of later prompts.

    Args:
        tokenizer: Of the verifier.
        ids: Without end tokens.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    channels = dict(_CHANNEL.findall(text))
    if channels:
        return {
            "role": "assistant",
            "content": channels.get("final", "").strip(),
            "thinking": channels.get("analysis", "").strip(),
        }
    return {"role": "assistant", "content": text.strip()}
