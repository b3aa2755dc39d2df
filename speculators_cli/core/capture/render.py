"""Renderer: rows of token ids with loss masks, from the input or from answers of an engine."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from speculators_cli.core.capture.generation_check import GenerationCheck
from speculators_cli.core.capture.rendered import (
    EMPTY_ANSWER,
    NO_ANSWER,
    NO_BOUNDARY,
    LeftOut,
    Rendered,
    RowBuilder,
    shorten,
)
from speculators_cli.core.capture.turns import (
    ConversationPlan,
    RowPlan,
    Turn,
    plan_rows,
    row_name,
)
from speculators_cli.core.conversations.encoder import Ids
from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.conversations.prompts import (
    Conversation,
    GivenTokens,
    RawPrompt,
    Source,
    Text,
)

BATCH_SOURCES = 64  # encoded at once


@dataclass(frozen=True)
class EngineTurn:
    """One answer of an engine."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]  # with the end token, if there is one
    is_truncated: bool


class Renderer:
    """Makes rows of tokens by the verifier's tokenizer and chat template.

    Args:
        tokenizer: Of transformers.
        end_ids: The verifier's end tokens.
        thinking: Passed to the chat template as `enable_thinking`; None: not passed.
        max_tokens: Maximum length of a row.
        vocab_size: Number of rows of the verifier's embedding.
        num_checked: First rows whose masks are compared with the template's generation blocks.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_ids: Iterable[int],
        thinking: bool | None,
        max_tokens: int,
        vocab_size: int,
        num_checked: int = 100,
    ) -> None:
        self.prompts = PromptRenderer(tokenizer, thinking=thinking, vocab_size=vocab_size)
        self.template, self._encoder = self.prompts.template, self.prompts.encoder
        self._end_ids = np.array(sorted(end_ids), np.int32)
        self._end_token = _compile_tokens(tokenizer, self._end_ids.tolist())
        self._max_tokens = max_tokens
        self._check = GenerationCheck(
            self.template, self._encoder, self._end_ids, num_rows=num_checked
        )

    def rows_of(self, source: Source) -> Rendered:
        """Return the rows of a source whose answers are given.

        Raises:
            SettingsError: A conversation without a chat template, or a foreign tokenizer.
            DataError: The mask differs from the template's own generation blocks.
        """
        return next(self.rows_of_all([source]))

    def rows_of_all(self, sources: Iterable[Source]) -> Iterator[Rendered]:
        """Yield the rows of each source, like `rows_of`; texts are encoded in batches."""
        remaining = iter(sources)
        while batch := list(islice(remaining, BATCH_SOURCES)):
            plans = [self._plan(source) for source in batch]
            texts = [text for plan in plans for text in _texts_of(plan)]
            encoded = iter(self._encoder.encode(texts))
            for source, plan in zip(batch, plans, strict=True):
                yield self._build(source, plan, encoded)

    def join(self, index: int, turns: Sequence[EngineTurn]) -> Rendered:
        """Return the rows of answers of an engine; the masks are its answers exactly.

        Args:
            index: Of the source.
            turns: In order, with the ids as they were sent and returned.
        """
        ids = [np.array([*turn.prompt_ids, *turn.answer_ids], np.int32) for turn in turns]
        starts = [len(turn.prompt_ids) for turn in turns]
        builder = RowBuilder(self._max_tokens)
        assert turns, "a source without answers is left out before"
        if all(turn.answer_ids for turn in turns) and _is_chain(ids, turns):
            mask = np.zeros(len(ids[-1]), np.bool_)
            for whole, start in zip(ids, starts, strict=True):
                mask[start : len(whole)] = True
            builder.add(row_name(index), ids[-1], mask)
        else:
            for number, (whole, start) in enumerate(zip(ids, starts, strict=True), start=1):
                name = row_name(index, number if len(turns) > 1 else None)
                if start == len(whole):
                    builder.left_out.append(LeftOut(name, EMPTY_ANSWER))
                else:
                    builder.add(name, whole, np.arange(len(whole)) >= start)
        return builder.finish(
            num_turns=len(turns), num_without_end=sum(turn.is_truncated for turn in turns)
        )

    def _plan(self, source: Source) -> "ConversationPlan | str | None":
        if isinstance(source, Conversation):
            return plan_rows(source, self.template, self._end_token)
        return source.text if isinstance(source, Text) else None

    def _build(
        self, source: Source, plan: "ConversationPlan | str | None", encoded: Iterator[Ids]
    ) -> Rendered:
        builder = RowBuilder(self._max_tokens)
        name = row_name(source.index)
        if isinstance(plan, ConversationPlan):
            return self._build_conversation(name, plan, encoded, builder)
        if isinstance(source, GivenTokens):
            builder.add(name, source.input_ids, source.loss_mask)
        elif isinstance(plan, str):
            begin, end = self._encoder.begin, self._encoder.end
            ids = np.concatenate([begin, next(encoded), end])
            builder.add(name, ids, np.arange(len(ids)) >= len(begin))
        else:
            assert isinstance(source, RawPrompt)
            builder.left_out.append(LeftOut(name, NO_ANSWER, shorten(source.text)))
        return builder.finish(num_turns=1)

    def _build_conversation(
        self, name: str, plan: ConversationPlan, encoded: Iterator[Ids], builder: RowBuilder
    ) -> Rendered:
        builder.left_out.extend(plan.left_out)
        if plan.num_turns == 0:
            builder.left_out.append(LeftOut(name, NO_ANSWER))
            return builder.finish(num_turns=1)
        num_without_end = 0
        for row in plan.rows:
            ids = next(encoded)
            mask = np.zeros(len(ids), np.bool_)
            for turn in row.turns:
                span = self._find_answer(turn, ids, next(encoded))
                if isinstance(span, LeftOut):
                    builder.left_out.append(span)
                    continue
                mask[span] = True
                num_without_end += ids[span.stop - 1] not in self._end_ids
            self._check.check(row, ids, mask)
            if mask.any():
                builder.add(row.name, ids, mask)
        return builder.finish(num_turns=plan.num_turns, num_without_end=num_without_end)

    def _find_answer(self, turn: Turn, ids: Ids, prompt_ids: Ids) -> slice | LeftOut:
        """Return where the answer is in the ids of a row."""
        start = count_common(ids, prompt_ids)
        if start < len(prompt_ids):
            # Only the generation prompt may differ: other answers begin otherwise.
            (history,) = self._encoder.encode([self.template.render(turn.history, turn.tools)])
            if start < len(history) or count_common(ids, history) < len(history):
                return LeftOut(turn.name, NO_BOUNDARY, shorten(turn.full))
        ends = np.flatnonzero(np.isin(ids[start:], self._end_ids))
        stop = start + int(ends[0]) + 1 if len(ends) else self._without_blank_end(ids, start)
        if stop == start:
            return LeftOut(turn.name, EMPTY_ANSWER, shorten(turn.full))
        return slice(start, stop)

    def _without_blank_end(self, ids: Ids, start: int) -> int:
        stop = len(ids)
        while stop > start and not self._encoder.decode(ids[stop - 1 : stop]).strip():
            stop -= 1
        return stop


def count_common(a: Ids, b: Ids) -> int:
    """Return the number of leading ids that are equal."""
    num_both = min(len(a), len(b))
    differing = np.flatnonzero(a[:num_both] != b[:num_both])
    return int(differing[0]) if len(differing) else num_both


def _texts_of(plan: "ConversationPlan | str | None") -> list[str]:
    if isinstance(plan, ConversationPlan):
        return [text for row in plan.rows for text in _texts_of_row(row)]
    return [] if plan is None else [plan]


def _texts_of_row(row: RowPlan) -> list[str]:
    return [row.full, *(turn.prompt for turn in row.turns)]


def _is_chain(ids: Sequence[Ids], turns: Sequence[EngineTurn]) -> bool:
    """Whether each prompt begins with the prompt and the answer before."""
    return all(
        len(whole) <= len(following.prompt_ids)
        and count_common(whole, np.array(following.prompt_ids, np.int32)) == len(whole)
        for whole, following in zip(ids, turns[1:], strict=False)
    )


def _compile_tokens(tokenizer: Any, ids: Sequence[int]) -> re.Pattern[str] | None:
    """Return what matches any of these tokens in a text."""
    added = tokenizer.added_tokens_decoder
    texts = [added[token_id].content for token_id in ids if token_id in added]
    return re.compile("|".join(map(re.escape, texts))) if texts else None
