"""Rows of tokens made from the input, and what was left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from speculators_cli.core.conversations.encoder import Ids, Mask
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.errors import DataError

NO_BOUNDARY = "no certain boundary between prompt and answer"
NO_ANSWER = "no answer"
EMPTY_ANSWER = "empty answer"
TOO_LONG = "no supervised token within"
PROMPT_TOO_LONG = "prompt longer than the maximum length"
TEMPLATE_ERROR = "template error: "
TRUNCATED = "answer without an end token"
MAX_LEFT_OUT_SHARE = 0.05  # of the turns
NUM_SHOWN = 2
MAX_SHOWN_CHARS = 600


def too_long(max_tokens: int) -> str:
    """Return the reason for a row whose answers begin too late."""
    return f"{TOO_LONG} {max_tokens:,} tokens"


@dataclass(frozen=True)
class LeftOut:
    """A turn or a row that was left out."""

    name: str
    reason: str  # one of a few: a key of the report
    text: str = ""  # for error messages


@dataclass(frozen=True)
class Rendered:
    """What became of one row of the input."""

    rows: tuple[TokenRow, ...]
    left_out: tuple[LeftOut, ...] = ()
    num_turns: int = 1  # answers, including those left out
    num_cut: int = 0  # rows that lost supervised tokens at the limit
    num_without_end: int = 0  # answers without an end token


@dataclass(frozen=True)
class RenderCounts:
    """Sums over rows of the input."""

    num_sources: int = 0
    num_turns: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_cut: int = 0
    num_without_end: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)  # by reason

    @classmethod
    def of(cls, rendered: Rendered) -> "RenderCounts":
        """Count one row of the input."""
        rows = rendered.rows
        return cls(
            num_sources=1,
            num_turns=rendered.num_turns,
            num_rows=len(rows),
            num_tokens=sum(len(row.input_ids) for row in rows),
            num_supervised_tokens=sum(int(row.loss_mask.sum()) for row in rows),
            num_cut=rendered.num_cut,
            num_without_end=rendered.num_without_end,
            left_out=dict(Counter(left.reason for left in rendered.left_out)),
        )

    @classmethod
    def total(cls, parts: "Iterable[RenderCounts]") -> "RenderCounts":
        """Return the sum."""
        sums: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        for part in parts:
            numbers = asdict(part)
            left_out.update(numbers.pop("left_out"))
            sums.update(numbers)
        return cls(**sums, left_out=dict(sorted(left_out.items())))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RenderCounts":
        """Return what `to_json` was called on."""
        return cls(**content)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def check_left_out(counts: RenderCounts, examples: Sequence[LeftOut]) -> None:
    """Check that most answers are supervised.

    Rows and prompts that are too long and truncated answers are not counted: they are left out by
    the user's choice.

    Args:
        counts: Of the whole input.
        examples: The first ones that were left out, or more.

    Raises:
        DataError: No token is supervised, or more than 5 % of the answers were left out.
    """
    judged = {
        reason: number
        for reason, number in counts.left_out.items()
        if not reason.startswith((TOO_LONG, PROMPT_TOO_LONG, TRUNCATED))
    }
    num_left_out = sum(judged.values())
    if counts.num_sources == 0:  # a rank without shards
        return
    if counts.num_supervised_tokens == 0:
        problem = f"No token of {counts.num_sources:,} rows is supervised"
        judged = dict(counts.left_out)
    elif num_left_out > MAX_LEFT_OUT_SHARE * counts.num_turns:
        share = num_left_out / counts.num_turns
        problem = f"{num_left_out:,} of {counts.num_turns:,} answers were left out ({share:.1%})"
    else:
        return
    reasons = ", ".join(f"{reason} ({number:,})" for reason, number in judged.items())
    shown = [left for left in examples if left.reason in judged][:NUM_SHOWN]
    texts = "".join(f"\n  {left.name}: {left.reason}\n    {left.text}".rstrip() for left in shown)
    raise DataError(f"{problem}: {reasons}{texts}", hint=_hint(judged))


def _hint(reasons: Mapping[str, int]) -> str:
    most = max(reasons, key=lambda reason: reasons[reason], default="")
    if most == NO_ANSWER:
        return "Pass `--regenerate` for answers of the verifier"
    if most.startswith((TOO_LONG, PROMPT_TOO_LONG)):
        return "Pass a higher `--total-seq-len`, up to the verifier's own limit, or shorter rows"
    if most.startswith(TEMPLATE_ERROR):
        return "Change the messages to what the verifier's chat template accepts"
    return "Pass `--regenerate`: its answers need no boundary, or check the data"


def shorten(text: str) -> str:
    """Return a text of limited length on one line; the beginning is cut off."""
    text = text if len(text) <= MAX_SHOWN_CHARS else f"...{text[-MAX_SHOWN_CHARS:]}"
    # Backticks enclose values of error messages.
    return text.replace("\n", "\\n").replace("`", "'")


class RowBuilder:
    """Collects the rows of one row of the input, and cuts them.

    Args:
        max_tokens: Maximum length of a row.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.rows: list[TokenRow] = []
        self.left_out: list[LeftOut] = []
        self.num_cut = 0

    def add(self, name: str, input_ids: Ids, loss_mask: Mask, *, text: str = "") -> None:
        """Add a row, without the tokens after its last supervised one.

        Args:
            name: Of the row.
            input_ids: Of any length.
            loss_mask: Of the same length.
            text: Of the row, for error messages.
        """
        # The first token is never predicted.
        if not loss_mask[1 : self.max_tokens].any():
            self.left_out.append(LeftOut(name, too_long(self.max_tokens), text))
            return
        self.num_cut += bool(loss_mask[self.max_tokens :].any())
        end = int(np.flatnonzero(loss_mask[: self.max_tokens])[-1]) + 1
        self.rows.append(TokenRow(name, input_ids[:end], loss_mask[:end]))

    def finish(self, *, num_turns: int, num_without_end: int = 0) -> Rendered:
        """Return the rows and counts."""
        return Rendered(
            tuple(self.rows), tuple(self.left_out), num_turns, self.num_cut, num_without_end
        )
