"""PromptRenderer: the token ids of prompts, as a server encodes them."""

from collections.abc import Sequence
from typing import Any

from speculators_cli.core.conversations.chat_template import ChatTemplate, Tools
from speculators_cli.core.conversations.encoder import Encoder
from speculators_cli.core.conversations.prompts import Message, RawPrompt


class PromptRenderer:
    """Makes prompts by the verifier's tokenizer and chat template.

    Args:
        tokenizer: Of transformers.
        thinking: Passed to the chat template as `enable_thinking`; None: not passed.
        vocab_size: Number of rows of the verifier's embedding.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool | None, vocab_size: int) -> None:
        self.template = ChatTemplate(tokenizer, thinking=thinking)
        self.encoder = Encoder(tokenizer, vocab_size)

    def render(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids of messages with the generation prompt.

        Raises:
            RenderError: The template rejects the messages.
            SettingsError: There is no chat template.
        """
        (ids,) = self.encoder.encode([self.template.render_prompt(messages, tools)])
        return list(ids.tolist())

    def render_raw(self, prompt: RawPrompt) -> list[int]:
        """Return the ids of a prompt: one user message, or raw if there is no chat template.

        Raises:
            RenderError: The template rejects it.
        """
        if not self.template.is_missing:
            return self.render(prompt.messages)
        (ids,) = self.encoder.encode([prompt.text])
        return [*self.encoder.begin.tolist(), *ids.tolist()]
