"""Data sets of the hub, read with the `datasets` package."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from speculators_cli.core.conversations.json_rows import Rows
from speculators_cli.core.conversations.table_rows import BATCH_ROWS, TableRows
from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.reading import first_line

DEFAULT_SPLIT = "train"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class HubDataset:
    """Where a data set is on the hub."""

    hub_id: str
    split: str = DEFAULT_SPLIT
    data_file: str | None = None  # of a repository whose files do not all have the same columns
    config: str | None = None  # of a repository with several data sets


SHORT_NAMES = {
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", "train_sft"),
    "sharegpt": HubDataset(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        data_file="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "magpie": HubDataset("Magpie-Align/Magpie-Pro-300K-Filtered"),
    "open-perfectblend": HubDataset("mlabonne/open-perfectblend"),
}


class HubPrompts:
    """Rows of a split of a data set.

    Args:
        name: A short name, or `owner/name`.
        split: None: the usual one.

    Raises:
        SettingsError: It is not the name of a data set, or has no such split.
        MachineError: `datasets` is not installed, or the download fails.
    """

    def __init__(self, name: str, *, split: str | None = None) -> None:
        self.name = name
        self._place = find_dataset(name)
        self._split = split or self._place.split
        self._table = load_table(self._place, self._split)

    def fingerprint(self) -> str:
        """Return name, split, and the fingerprint that `datasets` gives to its content."""
        own = getattr(self._table, "_fingerprint", "")
        return f"{self._place.hub_id} {self._split} {own}"

    def count_rows(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def iterate(self, start: int) -> Rows:
        """Yield rows, decoded in batches."""
        for first in range(start, len(self._table), BATCH_ROWS):
            end = min(first + BATCH_ROWS, len(self._table))
            rows = TableRows(partial(self._decode, first, end))
            for at in range(end - first):
                yield f"{self.name}, row {first + at + 1:,}", partial(rows.row, at)

    def _decode(self, first: int, end: int) -> list[dict[str, Any]]:
        columns = self._table[first:end]
        return [{key: values[at] for key, values in columns.items()} for at in range(end - first)]


def find_dataset(name: str) -> HubDataset:
    """Return where a data set is on the hub.

    Raises:
        SettingsError: It is neither a short name nor a hub id.
    """
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if name.endswith(LOCAL_SUFFIXES) or not HUB_ID.fullmatch(name):
        raise SettingsError(
            f"`{name}` is neither an existing path nor a data set",
            hint="Pass a file, a folder, a hub id such as `owner/name`, or one of "
            f"{', '.join(f'`{short}`' for short in SHORT_NAMES)}",
        )
    return HubDataset(name)


def load_table(place: HubDataset, split: str) -> Any:
    """Load a split of a data set with the `datasets` package.

    Raises:
        SettingsError: There is no such split.
        MachineError: `datasets` is not installed, or the download fails.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise MachineError(
            f"`{place.hub_id}` is not a local path, and the package `datasets` is not installed",
            hint="Run `pip install 'speculators-cli[hub]'`, or pass a local file",
        ) from None
    try:
        return datasets.load_dataset(
            place.hub_id, place.config, split=split, data_files=place.data_file
        )
    # Whatever the package, the network, or the data set's own files raise.
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise SettingsError(
                f"`{place.hub_id}` has no split `{split}`: {first_line(error)}",
                hint="Pass one of its splits with `--split`",
            ) from None
        raise MachineError(
            f"`{place.hub_id}` cannot be loaded from the hub: {first_line(error)}",
            hint="Check the name and the network, run `hf auth login` if it is gated, or pass "
            "a local file",
        ) from error
