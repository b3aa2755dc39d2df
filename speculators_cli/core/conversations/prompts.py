"""One row of the input of `generate-data`: a conversation, a prompt, a text, or token ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of ShareGPT and its relatives, under `from`.
ROLE_OF_SPEAKER = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
} | {role: role for role in ROLES}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CATEGORY_KEYS = ("category", "source", "dataset")

Message = Mapping[str, Any]  # `role`, `content`, and further fields that chat templates read


class BadRowError(ValueError):
    """A row cannot be used; the message completes a sentence that begins with the row."""


@dataclass(frozen=True)
class Conversation:
    """Messages, with or without answers."""

    index: int  # row of the whole input, from 0
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    category: str | None = None


@dataclass(frozen=True)
class RawPrompt:
    """A prompt without roles."""

    index: int
    text: str
    category: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The prompt as a message of the user."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Text:
    """A text whose every token is supervised."""

    index: int
    text: str
    category: str | None = None


@dataclass(frozen=True, eq=False)
class GivenTokens:
    """Token ids with their loss mask, taken as they are."""

    index: int
    input_ids: NDArray[np.int32]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]
    category: str | None = None


Source = Conversation | RawPrompt | Text | GivenTokens


def parse_row(row: object, index: int, *, vocab_size: int | None = None) -> Source:
    """Convert a row of the input.

    Args:
        row: Decoded JSON, or a row of a table.
        index: Its number in the whole input.
        vocab_size: Upper limit of token ids.

    Raises:
        BadRowError: It cannot be used.
    """
    if not isinstance(row, dict):
        raise BadRowError("is not an object")
    category = next((x for key in CATEGORY_KEYS if isinstance(x := row.get(key), str)), None)
    for key, parse in PARSERS.items():
        if row.get(key) is not None:
            return parse(row, index, category, vocab_size)
    raise BadRowError(f"has none of the keys {', '.join(f'`{key}`' for key in PARSERS)}")


def _parse_messages(
    row: dict[str, Any], index: int, category: str | None, _: int | None
) -> Conversation:
    return _build(row["messages"], row.get("tools"), index, category)


def _parse_conversations(
    row: dict[str, Any], index: int, category: str | None, _: int | None
) -> Conversation:
    messages = row["conversations"]
    if isinstance(messages, list):
        messages = [_from_share_gpt(message) for message in messages]
        system = row.get("system")
        if isinstance(system, str) and system and messages[:1] and not _is_system(messages[0]):
            messages = [{"role": "system", "content": system}, *messages]
    return _build(messages, row.get("tools"), index, category)


def _parse_prompt(
    row: dict[str, Any], index: int, category: str | None, _: int | None
) -> Conversation | RawPrompt:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return RawPrompt(index, _check_text(prompt, "`prompt`"), category)
    return _build(prompt, row.get("tools"), index, category)


def _parse_text(row: dict[str, Any], index: int, category: str | None, _: int | None) -> Text:
    return Text(index, _check_text(row["text"], "`text`"), category)


def _parse_tokens(
    row: dict[str, Any], index: int, category: str | None, vocab_size: int | None
) -> GivenTokens:
    ids = _to_integers(row["input_ids"], "`input_ids`")
    if row.get("loss_mask") is None:
        raise BadRowError("has `input_ids` without `loss_mask`")
    mask = _to_integers(row["loss_mask"], "`loss_mask`")
    if len(ids) != len(mask):
        raise BadRowError(f"has {len(ids):,} `input_ids` and a `loss_mask` of {len(mask):,}")
    if len(ids) == 0:
        raise BadRowError("has no tokens")
    limit = min(vocab_size or 2**31, 2**31)
    outside = ids[(ids < 0) | (ids >= limit)]
    if len(outside):
        raise BadRowError(f"has the token id {outside[0]}, outside of the vocabulary of {limit:,}")
    if not np.isin(mask, (0, 1)).all():
        raise BadRowError("has a `loss_mask` with values other than 0 and 1")
    # The first token is never predicted.
    if not mask[1:].any():
        raise BadRowError("has an empty `loss_mask`")
    return GivenTokens(index, ids.astype(np.int32), mask.astype(np.bool_), category)


Parser = Callable[[dict[str, Any], int, str | None, int | None], Source]
# By the key that a row of this kind has; the first one that is present decides.
PARSERS: dict[str, Parser] = {
    "messages": _parse_messages,
    "conversations": _parse_conversations,
    "input_ids": _parse_tokens,
    "prompt": _parse_prompt,
    "text": _parse_text,
}


def _build(messages: object, tools: object, index: int, category: str | None) -> Conversation:
    if not isinstance(messages, list):
        raise BadRowError("has messages that are not a list")
    if not messages:
        raise BadRowError("has an empty conversation")
    parsed = tuple(_parse_message(message, at) for at, message in enumerate(messages))
    _check_order(parsed)
    return Conversation(index, parsed, _parse_tools(tools), category)


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "user" in roles:
        return
    first = next((role for role in roles if role not in ("system", "developer")), None)
    if first is None:
        raise BadRowError("has a conversation without a user message")
    raise BadRowError(f"has a conversation that begins with `{first}`, without a user message")


def _parse_message(message: object, at: int) -> Message:
    if not isinstance(message, dict):
        raise BadRowError(f"has message {at}, which is not an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(f"has message {at} of an unknown role `{str(role)[:40]}`")
    parsed: dict[str, Any] = {"role": role, "content": _parse_content(message.get("content"), at)}
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            parsed[key] = message[key]
    if role == "assistant":
        parsed |= _parse_answer_fields(message, at)
    if not parsed["content"] and role in ("user", "assistant") and len(parsed) == 2:
        raise BadRowError(f"has message {at} ({role}) without text")
    return parsed


def _parse_answer_fields(message: dict[str, Any], at: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    reasoning = next((x for key in REASONING_KEYS if (x := message.get(key))), None)
    if reasoning is not None:
        # Each name is read by the templates of some family.
        fields |= dict.fromkeys(
            REASONING_KEYS, _check_text(reasoning, f"reasoning of message {at}")
        )
    if message.get("tool_calls"):
        fields["tool_calls"] = _parse_tool_calls(message["tool_calls"], at)
    return fields


def _parse_content(content: object, at: int) -> str:
    """Return the text of a message's content: a string, or a list of parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return _check_text(content, f"message {at}", may_be_empty=True)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = "an image" if str(kind).startswith("image") else f"a part of type `{kind}`"
            raise BadRowError(f"has {what} in message {at}, only text is supported")
        texts.append(_check_text(part.get("text"), f"message {at}", may_be_empty=True))
    return "".join(texts)


def _parse_tool_calls(calls: object, at: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects: templates encode them themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError(f"has `tool_calls` in message {at} that are not a list of objects")
    return [_parse_tool_call(call) for call in calls]


def _parse_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        return call | {"function": _parse_tool_call(function)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(decoded, dict):
            return call | {"arguments": decoded}
    return call


def _parse_tools(tools: object) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadRowError("has `tools` that are not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("has `tools` that are not a list of objects")
    return tuple(tools)


def _from_share_gpt(message: object) -> object:
    """Convert a message with `from` and `value`; others are returned as they are."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    speaker = message["from"]
    role = ROLE_OF_SPEAKER.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {**message, "role": role, "content": message.get("value", message.get("content"))}


def _is_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _check_text(text: object, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise BadRowError(f"has no text in {where}")
    if not text and not may_be_empty:
        raise BadRowError(f"has an empty {where}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRowError(f"has invalid Unicode in {where}") from None
    return text


def _to_integers(values: object, where: str) -> NDArray[np.int64]:
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        try:
            return np.array(values, np.int64)
        except OverflowError:
            pass
    raise BadRowError(f"has {where} that is not a list of whole numbers")
