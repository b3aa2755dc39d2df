"""Where the answers are in the ids of a rendered conversation."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.capture.rendered import EMPTY_ANSWER, NO_BOUNDARY, LeftOut, shorten
from speculators_cli.core.capture.turns import RowPlan, Turn
from speculators_cli.core.conversations.chat_template import ChatTemplate
from speculators_cli.core.conversations.encoder import Encoder, Ids


@dataclass(frozen=True)
class PromptText:
    """The prompt of a turn, as far as it has to be encoded."""

    text: str
    num_splits: int = 0  # split tokens of the row before this text; 0: the whole prompt


@dataclass(frozen=True)
class RowTexts:
    """The texts of a row that have to be encoded."""

    row: RowPlan
    prompts: tuple[PromptText, ...]
    num_splits: int  # split tokens of the row

    @property
    def texts(self) -> list[str]:
        """The row's own text, then those of its prompts."""
        return [self.row.full, *(prompt.text for prompt in self.prompts)]


class AnswerFinder:
    """Compares the ids of prompts with the ids of the whole row.

    A special token splits a text: what is before it does not change the ids of what follows. So
    of a prompt with which the row begins, only the part from its last special token on is encoded.

    Args:
        tokenizer: Of transformers.
        encoder: Of the tokenizer.
        template: Of the tokenizer.
        end_ids: The verifier's end tokens.
    """

    def __init__(
        self, tokenizer: Any, encoder: Encoder, template: ChatTemplate, end_ids: Ids
    ) -> None:
        self._encoder = encoder
        self._template = template
        self._end_ids = end_ids
        added = tokenizer.added_tokens_decoder if tokenizer.is_fast else {}
        splits = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special
            and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }
        self._split_ids = np.array(sorted(splits), np.int32)
        self._split_token = compile_tokens(splits.values())

    def list_texts(self, row: RowPlan) -> RowTexts:
        """Return what has to be encoded."""
        found = list(self._split_token.finditer(row.full)) if self._split_token else []
        ends = [match.end() for match in found]
        prompts = []
        for turn in row.turns:
            num_splits = bisect_right(ends, len(turn.prompt)) - 1
            if num_splits > 0 and row.full.startswith(turn.prompt):
                tail = turn.prompt[found[num_splits].start() :]
                prompts.append(PromptText(tail, num_splits))
            else:
                prompts.append(PromptText(turn.prompt))
        return RowTexts(row, tuple(prompts), len(found))

    def find(self, texts: RowTexts, ids: Ids, prompts: Iterator[Ids]) -> list[slice | LeftOut]:
        """Return where the answer of each turn is.

        Args:
            texts: Of `list_texts`.
            ids: Of the row.
            prompts: Ids of the texts of the prompts, in order.
        """
        splits = np.flatnonzero(np.isin(ids, self._split_ids))
        is_as_expected = len(splits) == texts.num_splits
        ends = np.flatnonzero(np.isin(ids, self._end_ids))
        found: list[slice | LeftOut] = []
        for turn, prompt in zip(texts.row.turns, texts.prompts, strict=True):
            prompt_ids, at = next(prompts), 0
            if prompt.num_splits and is_as_expected:
                at = int(splits[prompt.num_splits])
            elif prompt.num_splits:
                (prompt_ids,) = self._encoder.encode([turn.prompt])
            start = self._find_start(turn, ids, prompt_ids, at)
            if start is None:
                found.append(LeftOut(turn.name, NO_BOUNDARY, shorten(turn.full)))
            else:
                found.append(self._find_end(turn, ids, start, ends))
        return found

    def _find_start(self, turn: Turn, ids: Ids, prompt_ids: Ids, at: int) -> int | None:
        """Return where the answer starts; None if that is uncertain."""
        start = at + count_common(ids[at:], prompt_ids)
        if start == at + len(prompt_ids):
            return start
        # Only the generation prompt may differ.
        (history,) = self._encoder.encode([self._template.render(turn.history, turn.tools)])
        is_certain = count_common(ids[:start], history) == len(history)
        return start if is_certain else None

    def _find_end(
        self, turn: Turn, ids: Ids, start: int, ends: NDArray[np.intp]
    ) -> slice | LeftOut:
        """Return the answer with its end token, without what the template puts after that."""
        following = ends[np.searchsorted(ends, start) :]
        if len(following):
            # More than the end token: templates may drop what they do not expect.
            stop = int(following[0]) + 1
            is_empty = stop - start == 1
        else:
            stop = self._without_blank_end(ids, start)
            is_empty = stop == start
        return (
            LeftOut(turn.name, EMPTY_ANSWER, shorten(turn.full)) if is_empty else slice(start, stop)
        )

    def _without_blank_end(self, ids: Ids, start: int) -> int:
        stop = len(ids)
        while stop > start and not self._encoder.decode(ids[stop - 1 : stop]).strip():
            stop -= 1
        return stop


def compile_tokens(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return what matches any of these tokens in a text, the longest if several do."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def count_common(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """Return the number of leading ids that are equal."""
    num_both = min(len(a), len(b))
    differing = np.flatnonzero(np.asarray(a[:num_both]) != np.asarray(b[:num_both]))
    return int(differing[0]) if len(differing) else num_both
