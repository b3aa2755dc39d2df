"""Renderer: rows of token ids with loss masks, from the input or from answers of an engine."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from speculators_cli.core.capture.answer_finder import (
    AnswerFinder,
    RowTexts,
    compile_tokens,
    count_common,
)
from speculators_cli.core.capture.generation_check import GenerationCheck
from speculators_cli.core.capture.rendered import (
    EMPTY_ANSWER,
    NO_ANSWER,
    LeftOut,
    Rendered,
    RowBuilder,
    shorten,
)
from speculators_cli.core.capture.turns import ConversationPlan, plan_rows, row_name
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
        self.end_ids = frozenset(end_ids)
        ids = np.array(sorted(self.end_ids), np.int32)
        added = tokenizer.added_tokens_decoder
        self._end_token = compile_tokens(added[i].content for i in self.end_ids if i in added)
        self._max_tokens = max_tokens
        self._finder = AnswerFinder(tokenizer, self._encoder, self.template, ids)
        self._check = GenerationCheck(self.template, self._encoder, ids, num_rows=num_checked)

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
            texts = [text for plan in plans for text in plan.texts]
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

    def _plan(self, source: Source) -> "_Plan":
        if isinstance(source, Text):
            return _Plan((source.text,))
        if not isinstance(source, Conversation):
            return _Plan()
        conversation = plan_rows(source, self.template, self._end_token)
        rows = tuple(self._finder.list_texts(row) for row in conversation.rows)
        return _Plan(tuple(text for row in rows for text in row.texts), conversation, rows)

    def _build(self, source: Source, plan: "_Plan", encoded: Iterator[Ids]) -> Rendered:
        if plan.conversation is not None:
            return self._build_conversation(source.index, plan.conversation, plan.rows, encoded)
        builder = RowBuilder(self._max_tokens)
        name = row_name(source.index)
        if isinstance(source, GivenTokens):
            builder.add(name, source.input_ids, source.loss_mask)
        elif isinstance(source, Text):
            begin, end = self._encoder.begin, self._encoder.end
            ids = np.concatenate([begin, next(encoded), end])
            is_text = np.arange(len(ids)) >= len(begin)
            builder.add(name, ids, is_text, text=shorten(source.text))
        else:
            assert isinstance(source, RawPrompt)
            builder.left_out.append(LeftOut(name, NO_ANSWER, shorten(source.text)))
        return builder.finish(num_turns=1)

    def _build_conversation(
        self,
        index: int,
        conversation: ConversationPlan,
        rows: Sequence[RowTexts],
        encoded: Iterator[Ids],
    ) -> Rendered:
        builder = RowBuilder(self._max_tokens)
        builder.left_out.extend(conversation.left_out)
        if conversation.num_turns == 0:
            builder.left_out.append(LeftOut(row_name(index), NO_ANSWER))
            return builder.finish(num_turns=1)
        num_without_end = 0
        for texts in rows:
            ids = next(encoded)
            mask = np.zeros(len(ids), np.bool_)
            for span in self._finder.find(texts, ids, encoded):
                if isinstance(span, LeftOut):
                    builder.left_out.append(span)
                    continue
                mask[span] = True
                num_without_end += int(ids[span.stop - 1]) not in self.end_ids
            if mask.any():
                self._check.check(texts.row, ids, mask)
                builder.add(texts.row.name, ids, mask, text=shorten(texts.row.full))
        return builder.finish(num_turns=conversation.num_turns, num_without_end=num_without_end)


@dataclass(frozen=True)
class _Plan:
    """What has to be encoded for a source."""

    texts: tuple[str, ...] = ()
    conversation: ConversationPlan | None = None
    rows: tuple[RowTexts, ...] = ()


def _is_chain(ids: Sequence[Ids], turns: Sequence[EngineTurn]) -> bool:
    """Whether each prompt begins with the prompt and the answer before."""
    return all(
        count_common(whole, following.prompt_ids) == len(whole)
        for whole, following in zip(ids, turns[1:], strict=False)
    )
