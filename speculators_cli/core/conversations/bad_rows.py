"""Rows of the input that cannot be used: counted and listed; too many end the command."""

from collections.abc import Sequence
from dataclasses import dataclass

from speculators_cli.core.errors import DataError

MAX_SHARE = 0.01  # of the rows, unless a number is set
NUM_FIRST = 100  # rows after which an input of only bad rows is refused
MAX_LISTED = 1_000
NUM_SHOWN = 5


@dataclass(frozen=True)
class BadRow:
    """One row, and why it cannot be used."""

    place: str  # `chats/a.jsonl, line 12`
    reason: str  # completes a sentence that begins with the place


class BadRows:
    """Counts rows and lists bad ones.

    Args:
        max_bad: Number of bad rows that are tolerated; None: 1 % of the rows.
        num_rows: Rows that were read before.
        num_bad: Bad rows among them.
        listed: The first of these.
    """

    def __init__(
        self,
        max_bad: int | None = None,
        *,
        num_rows: int = 0,
        num_bad: int = 0,
        listed: Sequence[BadRow] = (),
    ) -> None:
        self.max_bad = max_bad
        self.num_rows = num_rows
        self.num_bad = num_bad
        self.listed = list(listed)[:MAX_LISTED]

    def add_good(self) -> None:
        """Count a row."""
        self.num_rows += 1

    def add(self, row: BadRow) -> None:
        """Count and list a bad row.

        Raises:
            DataError: There are too many, whatever follows.
        """
        self.num_rows += 1
        self.num_bad += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(row)
        if self.max_bad is None:
            if self.num_bad == self.num_rows == NUM_FIRST:
                raise self._too_many()
        elif self.num_bad > self.max_bad:
            raise self._too_many()

    def check(self) -> None:
        """Check the number of bad rows after the last row.

        Raises:
            DataError: There are too many.
        """
        limit = self.num_rows * MAX_SHARE if self.max_bad is None else self.max_bad
        if self.num_bad > limit:
            raise self._too_many()

    def _too_many(self) -> DataError:
        shown = "\n".join(f"  {row.place} {row.reason}" for row in self.listed[:NUM_SHOWN])
        more = self.num_bad - min(len(self.listed), NUM_SHOWN)
        rest = f"\n  and {more:,} more" if more else ""
        limit = "1% of them" if self.max_bad is None else f"{self.max_bad:,}"
        return DataError(
            f"{self.num_bad:,} of {self.num_rows:,} rows cannot be used, more than {limit}:\n"
            f"{shown}{rest}",
            hint="Correct or remove these rows, or pass a higher `--max-bad-rows`",
        )
