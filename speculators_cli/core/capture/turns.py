"""The rows that a conversation with answers becomes, as strings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from speculators_cli.core.capture.rendered import TEMPLATE_ERROR, LeftOut, shorten
from speculators_cli.core.conversations.chat_template import ChatTemplate, RenderError, Tools
from speculators_cli.core.conversations.prompts import Conversation, Message


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation."""

    name: str  # of its row, if it has one of its own
    messages: tuple[Message, ...]  # up to the answer, included
    tools: Tools
    prompt: str  # the messages before, with the generation prompt
    full: str  # with the answer

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1]


@dataclass(frozen=True)
class RowPlan:
    """A row to be made, with the answers that are supervised in it."""

    name: str
    turns: tuple[Turn, ...]  # the text of the row is that of the last one

    @property
    def full(self) -> str:
        """The text of the row."""
        return self.turns[-1].full


@dataclass(frozen=True)
class ConversationPlan:
    """The rows of a conversation."""

    rows: tuple[RowPlan, ...]
    left_out: tuple[LeftOut, ...]
    num_turns: int


def plan_rows(
    conversation: Conversation, template: ChatTemplate, end_token: re.Pattern[str] | None
) -> ConversationPlan:
    """Render the answers of a conversation: in one row if its text never changes, else a row each.

    Args:
        conversation: Answers without a message before them are not supervised.
        template: Renders.
        end_token: Matches the verifier's end tokens.

    Raises:
        SettingsError: There is no chat template.
    """
    messages = conversation.messages
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns: list[Turn] = []
    left_out: list[LeftOut] = []
    name = row_name(conversation.index)
    for number, end in enumerate(ends, start=1):
        if end == 1:
            continue
        turn_name = row_name(conversation.index, number if len(ends) > 1 else None)
        try:
            turns.append(_render_turn(turn_name, messages[:end], conversation.tools, template))
        except RenderError as error:
            left_out.append(describe_rejection(turn_name, error, messages))
    num_turns = len(turns) + len(left_out)
    if turns and is_one_row(turns, end_token):
        return ConversationPlan((RowPlan(name, tuple(turns)),), tuple(left_out), num_turns)
    rows = tuple(RowPlan(turn.name, (turn,)) for turn in turns)
    return ConversationPlan(rows, tuple(left_out), num_turns)


def describe_rejection(name: str, error: RenderError, messages: Sequence[Message]) -> LeftOut:
    """Return the entry for messages that the chat template rejects."""
    message = messages[error.index]
    text = f"message {error.index} ({message['role']}): {shorten(str(message['content']))}"
    return LeftOut(name, f"{TEMPLATE_ERROR}{error}", text)


def row_name(index: int, turn: int | None = None) -> str:
    """Return the name of a row: `000123`, or `000123-turn2`."""
    return f"{index:06d}" if turn is None else f"{index:06d}-turn{turn}"


def is_one_row(turns: Sequence[Turn], end_token: re.Pattern[str] | None) -> bool:
    """Whether each turn, up to its end token, begins the prompt of the next one unchanged."""
    for turn, following in pairwise(turns):
        start = _count_common(turn.prompt, turn.full)
        end = end_token.search(turn.full, start) if end_token else None
        if end is None or not following.prompt.startswith(turn.full[: end.end()]):
            return False
    return True


def _render_turn(
    name: str, messages: tuple[Message, ...], tools: Tools, template: ChatTemplate
) -> Turn:
    full = template.render(messages, tools)
    prompt = template.render_prompt_before(full, messages[:-1], tools)
    return Turn(name, messages, tools, prompt, full)


def _count_common(a: str, b: str) -> int:
    """Return the number of leading characters that are equal."""
    if b.startswith(a):
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, b + "\0", strict=False)) if x != y)
