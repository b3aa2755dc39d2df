"""The verifier's chat template: conversations and prompts as strings."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from speculators_cli.core.conversations.prompts import Message
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.reading import first_line

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINKING_SWITCH = "enable_thinking"
# What a template raises by itself, and on messages that its author did not think of.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)

Tools = Sequence[Mapping[str, Any]] | None


class RenderError(ValueError):
    """The chat template rejects a conversation; the message is its sentence.

    Args:
        sentence: Of the template.
        index: Of the message that it rejects.
    """

    def __init__(self, sentence: str, *, index: int) -> None:
        super().__init__(sentence)
        self.index = index


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: Of transformers.
        thinking: Passed to the template as `enable_thinking`; None: not passed.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking

    @property
    def is_missing(self) -> bool:
        """Whether the tokenizer has no chat template: the verifier is a base model."""
        return not self._tokenizer.chat_template

    @cached_property
    def has_generation_blocks(self) -> bool:
        """Whether the template marks what the verifier generates."""
        return GENERATION_BLOCK.search(self._text) is not None

    @cached_property
    def _text(self) -> str:
        template = self._tokenizer.chat_template
        return "".join(template.values()) if isinstance(template, dict) else str(template or "")

    def render(self, messages: Sequence[Message], tools: Tools) -> str:
        """Render messages, without a generation prompt.

        Raises:
            RenderError: The template rejects them.
            SettingsError: There is no template.
        """
        return self._render(messages, tools, is_prompt=False, thinking=self._thinking)

    def render_prompt(self, messages: Sequence[Message], tools: Tools) -> str:
        """Render messages and the generation prompt, as a server does.

        Raises:
            RenderError: The template rejects them.
            SettingsError: There is no template.
        """
        return self._render(messages, tools, is_prompt=True, thinking=self._thinking)

    def render_prompt_before(self, full: str, messages: Sequence[Message], tools: Tools) -> str:
        """Render the prompt that is followed by the answer in `full`, the rendered conversation.

        A template that can switch thinking off puts an empty block of thoughts in front of answers
        without any. It belongs to the prompt, of which that is the variant without thinking.
        """
        own = self.render_prompt(messages, tools)
        if THINKING_SWITCH not in self._text:
            return own
        others = [
            self._render(messages, tools, is_prompt=True, thinking=thinking)
            for thinking in (False, True)
        ]
        fitting = [prompt for prompt in (own, *others) if full.startswith(prompt)]
        return max(fitting, key=len, default=own)

    def mark_generated(self, messages: Sequence[Message], tools: Tools) -> tuple[Any, Any]:
        """Return the ids of a rendered conversation, and what the template marks as generated."""
        out = self._tokenizer.apply_chat_template(
            list(messages),
            tools=_as_list(tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
            **self._switch(self._thinking),
        )
        return out["input_ids"], out["assistant_masks"]

    def _render(
        self, messages: Sequence[Message], tools: Tools, *, is_prompt: bool, thinking: bool | None
    ) -> str:
        if self.is_missing:
            name = self._tokenizer.name_or_path
            raise SettingsError(
                f"The tokenizer of `{name}` has no chat template, which conversations need",
                hint="Pass an instruction-tuned verifier, or rows with `text` or `prompt`",
            )
        try:
            return self._apply(messages, tools, is_prompt=is_prompt, thinking=thinking)
        except TEMPLATE_ERRORS as error:
            index = self._find_rejected(messages, tools, thinking)
            raise RenderError(first_line(error), index=index) from None

    def _apply(
        self, messages: Sequence[Message], tools: Tools, *, is_prompt: bool, thinking: bool | None
    ) -> str:
        how = {"tokenize": False, "add_generation_prompt": is_prompt, **self._switch(thinking)}
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tools=_as_list(tools), **how)
        except TypeError:
            # Some templates join the arguments of a tool call as a string.
            encoded = [_encode_arguments(message) for message in messages]
            text = self._tokenizer.apply_chat_template(encoded, tools=_as_list(tools), **how)
        assert isinstance(text, str)
        return text

    def _find_rejected(
        self, messages: Sequence[Message], tools: Tools, thinking: bool | None
    ) -> int:
        """Return the index of the first message that the template rejects after those before."""
        for end in range(1, len(messages)):
            try:
                self._apply(messages[:end], tools, is_prompt=False, thinking=thinking)
            except TEMPLATE_ERRORS:
                return end - 1
        return max(len(messages) - 1, 0)

    @staticmethod
    def _switch(thinking: bool | None) -> dict[str, bool]:
        return {} if thinking is None else {THINKING_SWITCH: thinking}


def _as_list(tools: Tools) -> list[Mapping[str, Any]] | None:
    return None if tools is None else list(tools)


def _encode_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_encode_call(call) for call in message["tool_calls"]]}


def _encode_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _encode_call(call["function"])}
    if isinstance(call.get("arguments"), dict):
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call
