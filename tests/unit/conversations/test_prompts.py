"""Rows of files, folders and data sets of the hub; what cannot be used is listed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speculators_cli.core.conversations import json_rows
from speculators_cli.core.conversations.bad_rows import BadRow, BadRows
from speculators_cli.core.conversations.prompt_files import open_prompts, read_prompts
from speculators_cli.core.conversations.prompts import (
    BadRowError,
    Conversation,
    GivenTokens,
    RawPrompt,
    Source,
    Text,
    parse_row,
)
from speculators_cli.core.errors import DataError, MachineError, SettingsError

USER = {"role": "user", "content": "Two and three?"}
ANSWER = {"role": "assistant", "content": "Five."}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}


def write_lines(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def read(path: Path, bad: BadRows | None = None, **more: Any) -> list[Source]:
    return list(read_prompts(open_prompts(str(path)), bad or BadRows(), **more))


def texts(sources: Sequence[Source]) -> list[tuple[int, str]]:
    assert all(isinstance(source, RawPrompt | Text) for source in sources)
    return [(source.index, source.text) for source in sources]  # type: ignore[union-attr]


def test_messages_keep_roles_and_the_fields_that_templates_read() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "developer", "content": "Think."},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "C", "refusal": None},
    ]

    source = parse_row({"messages": messages, "tools": [{"name": "add"}], "source": "math"}, 5)

    assert isinstance(source, Conversation)
    assert (source.index, source.category, source.tools) == (5, "math", ({"name": "add"},))
    parsed_call = {"id": "1", "function": {"name": "add", "arguments": {"a": 2}}}
    thoughts = {"reasoning_content": "hm", "reasoning": "hm", "thinking": "hm"}
    assert source.messages == (
        {"role": "developer", "content": "Think."},
        {"role": "user", "content": "AB"},
        {"role": "assistant", "content": "", "tool_calls": [parsed_call], **thoughts},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "C"},
    )


@pytest.mark.parametrize("answerer", ["gpt", "assistant", "bot", "chatgpt"])
@pytest.mark.parametrize("asker", ["human", "user"])
def test_share_gpt_has_speakers_for_roles(asker: str, answerer: str) -> None:
    conversation = [
        {"from": "system", "value": "Think."},
        {"from": asker, "value": "A"},
        {"from": answerer, "value": "B"},
        {"from": "observation", "value": "C"},
    ]

    source = parse_row({"id": "x", "conversations": conversation}, 0)

    assert isinstance(source, Conversation)
    found = [(message["role"], message["content"]) for message in source.messages]
    assert found == [("system", "Think."), ("user", "A"), ("assistant", "B"), ("tool", "C")]


def test_conversations_may_have_roles_and_a_system_prompt_beside_them() -> None:
    source = parse_row({"system": "Think.", "conversations": [USER, ANSWER]}, 0)

    assert isinstance(source, Conversation)
    assert source.messages == ({"role": "system", "content": "Think."}, USER, ANSWER)


def test_other_kinds_of_rows() -> None:
    assert parse_row({"prompt": "A", "text": "B"}, 1) == RawPrompt(1, "A")
    assert parse_row({"text": "B", "dataset": 3}, 2) == Text(2, "B")
    assert parse_row({"prompt": [USER]}, 3) == Conversation(3, (USER,))
    assert parse_row({"prompt": "A", "messages": [USER]}, 4) == Conversation(4, (USER,))

    given = parse_row({"input_ids": [3, 1, 2], "loss_mask": [0, 1, True]}, 5, vocab_size=4)

    assert isinstance(given, GivenTokens)
    assert given.input_ids.dtype == np.int32
    assert given.input_ids.tolist() == [3, 1, 2]
    assert given.loss_mask.tolist() == [False, True, True]


BAD: dict[str, tuple[object, str]] = {
    "a list": ([1], "is not an object"),
    "other keys": ({"question": "A"}, "has none of the keys `messages`, `conversations`, `input_i"),
    "no messages": ({"messages": []}, "has an empty conversation"),
    "messages of text": ({"messages": "A"}, "has messages that are not a list"),
    "a text among messages": ({"messages": [USER, "A"]}, "has message 1, which is not an object"),
    "a role": (
        {"messages": [USER, {"role": "critic"}]},
        "has message 1 of an unknown role `critic`",
    ),
    "a speaker": ({"conversations": [{"from": "x"}]}, "has message 0 of an unknown role `x`"),
    "no text": ({"messages": [{"role": "user"}]}, "has message 0 (user) without text"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "has no text in message 0"),
    "an image": ({"messages": [IMAGE]}, "has an image in message 0, only text is supported"),
    "no user": ({"messages": [ANSWER]}, "has a conversation that begins with `assistant`, without"),
    "surrogates": ({"text": "\ud800"}, "has invalid Unicode in `text`"),
    "an empty prompt": ({"prompt": ""}, "has an empty `prompt`"),
    "tools": ({"messages": [USER], "tools": "{"}, "has `tools` that are not JSON"),
    "no mask": ({"input_ids": [1]}, "has `input_ids` without `loss_mask`"),
    "lengths": (
        {"input_ids": [1], "loss_mask": [1, 1]},
        "has 1 `input_ids` and a `loss_mask` of 2",
    ),
    "an id": (
        {"input_ids": [1, 9], "loss_mask": [0, 1]},
        "has the token id 9, outside of the voca",
    ),
    "a large id": ({"input_ids": [2**70], "loss_mask": [1]}, "has `input_ids` that is not a list"),
    "fractions": (
        {"input_ids": [1.5], "loss_mask": [1]},
        "has `input_ids` that is not a list of w",
    ),
    "no supervised": ({"input_ids": [1, 1], "loss_mask": [1, 0]}, "has an empty `loss_mask`"),
    "mask of twos": (
        {"input_ids": [1, 1], "loss_mask": [0, 2]},
        "has a `loss_mask` with values oth",
    ),
    "no ids": ({"input_ids": [], "loss_mask": []}, "has no tokens"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_rows_that_cannot_be_used_have_a_reason(row: object, reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        parse_row(row, 0, vocab_size=9)

    assert str(error.value).startswith(reason)


def test_bad_lines_are_listed_and_keep_their_index(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "A"}\r\n\n{"text": \n{"text": "\xff"}\n{"text": "B"}')
    bad = BadRows(max_bad=2)

    sources = read(file, bad)

    assert texts(sources) == [(0, "A"), (3, "B")]
    assert (bad.num_rows, bad.num_bad) == (4, 2)
    assert bad.listed == [
        BadRow(f"{file}, line 3", "is not JSON: Expecting value, at column 10"),
        BadRow(f"{file}, line 4", "is not UTF-8 text (at byte 10)"),
    ]


def test_a_line_of_any_length_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 50)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "A" * 500}, {"text": "B"}])
    bad = BadRows(max_bad=1)

    assert texts(read(file, bad)) == [(1, "B")]
    assert bad.listed == [BadRow(f"{file}, line 1", "has more than 50 bytes")]


def test_more_than_one_percent_of_bad_rows_is_an_error(tmp_path: Path) -> None:
    good: list[object] = [{"text": "A"}] * 198
    file = write_lines(tmp_path / "a.jsonl", [*good, {}, {}])
    assert len(read(file)) == 198

    write_lines(file, [*good, {}, {}, {}])
    with pytest.raises(DataError, match="3 of 201 rows cannot be used, more than 1%") as error:
        read(file)

    assert f"{file}, line 199 has none of the keys" in error.value.message


def test_an_input_of_bad_rows_only_is_refused_early(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{}] * 500)

    with pytest.raises(DataError, match="100 of 100 rows cannot be used") as error:
        read(file)

    assert "and 95 more" in error.value.message


def test_a_set_number_of_bad_rows_is_tolerated(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{}, {}, {"text": "A"}])

    assert texts(read(file, BadRows(max_bad=2))) == [(2, "A")]
    with pytest.raises(DataError, match="2 of 2 rows cannot be used, more than 1:"):
        read(file, BadRows(max_bad=1))


def test_a_part_of_the_rows_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_lines(folder / "a.jsonl", [{"text": str(i)} for i in range(3)])
    write_lines(folder / "b.jsonl", [{"text": str(i)} for i in range(3, 6)])

    assert texts(read(folder, start=2, stop=5)) == [(2, "2"), (3, "3"), (4, "4")]
    assert open_prompts(str(folder)).count_rows() == 6


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "3"}])
    write_lines(tmp_path / "a/z.jsonl", [{"text": "2"}])
    write_lines(tmp_path / "a/.cache/x.jsonl", [{"text": "never"}])
    (tmp_path / "a/c.json").write_text('[{"text": "1"}]')
    (tmp_path / "readme.md").write_text("never")

    assert texts(read(tmp_path)) == [(0, "1"), (1, "2"), (2, "3")]


@pytest.mark.parametrize("buffer_bytes", [3, 2**20])
def test_a_json_list_is_read_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    monkeypatch.setattr(json_rows, "BUFFER_BYTES", buffer_bytes)
    rows = [{"text": "Zürich " * 9}, {"text": "B"}, {"x": [1, {}]}]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    bad = BadRows(max_bad=1)

    sources = read(file, bad)

    assert texts(sources) == [(0, "Zürich " * 9), (1, "B")]
    assert bad.listed[0].place == f"{file}, item 3"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "A"}', "is not a complete JSON list, after item 1: expected `,`, found `its e"),
        ('[{"text": "A"}, {"te', "is not a complete JSON list, after item 1: "),
        (
            '[{"text": "A"} {"te',
            "is not a complete JSON list, after item 1: expected `,`, found `{",
        ),
        ("", "is empty (0 bytes)"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
)
def test_damaged_files_are_an_error(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)

    with pytest.raises(DataError) as error:
        read(file)

    assert error.value.message.startswith(f"`{file}` {reason}")


def test_a_json_file_may_have_an_object_per_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.json", [{"text": "A"}, {"text": "B"}])

    assert texts(read(file)) == [(0, "A"), (1, "B")]


def test_an_input_without_rows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[ ]")

    with pytest.raises(DataError, match="has no rows"):
        read(file)


def test_parquet_rows_lack_the_keys_of_other_rows(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    chat = [USER, {**ANSWER, "tool_calls": [call]}]
    rows = [{"messages": chat}, {"messages": [USER]}, {"text": "A"}] * 100
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "a.parquet")

    sources = read(tmp_path / "a.parquet")

    assert [source.index for source in sources] == list(range(300))
    assert sources[298] == Conversation(298, (USER,))
    assert sources[299] == Text(299, "A")
    first = sources[0]
    assert isinstance(first, Conversation)
    assert first.messages[1]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 2}}}]


FUNCTION = pa.struct([("name", pa.string()), ("arguments", pa.string())])
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("tool_calls", pa.list_(pa.struct([("function", FUNCTION)]))),
    ]
)
SCHEMA = pa.schema([("messages", pa.list_(MESSAGE)), ("text", pa.string())])


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)

    with pytest.raises(DataError, match=r"a.parquet` cannot be read after row 0"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("argument", "package", "extra"),
    [("a.parquet", "pyarrow", "arrow"), ("ultrachat", "datasets", "hub")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, package: str, extra: str
) -> None:
    pq.write_table(pa.table({"text": ["A"]}), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MachineError) as error:
        read(Path(argument))

    assert str(error.value.hint).startswith(f"Run `pip install 'speculators-cli[{extra}]'`")


@pytest.mark.parametrize("name", ["chats.jsonl", "./data", "a/b/c", "ultrachat2"])
def test_what_is_neither_a_path_nor_a_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is neither an existing path nor a data set"):
        open_prompts(name)


def test_files_of_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\nA\n")

    with pytest.raises(SettingsError, match=r"is not one of `\.jsonl`, `\.json`, `\.parquet`"):
        open_prompts(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="has no files of"):
        open_prompts(str(tmp_path))


class FakeTable:
    """A table of `datasets`: slices are columns."""

    _fingerprint = "f00"

    def __len__(self) -> int:
        return 300

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        numbers = range(300)[rows]
        return {
            "text": [None if i == 299 else str(i) for i in numbers],
            "prompt": [str(i) if i == 299 else None for i in numbers],
        }


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the package `datasets` was asked for."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(
        path: str, name: str | None, *, split: str, data_files: str | None
    ) -> FakeTable:
        assert name is None
        calls.append((path, split, data_files))
        if split == "no":
            raise ValueError('Unknown split "no". Should be one of ["train"].')
        if path == "some/private":
            raise ConnectionError("offline")
        return FakeTable()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_of_a_data_set_of_the_hub(loaded: list[tuple[Any, ...]]) -> None:
    prompts = open_prompts("owner/name", split="test")

    sources = list(read_prompts(prompts, BadRows(), start=250))

    assert loaded == [("owner/name", "test", None)]
    assert prompts.count_rows() == 300
    assert prompts.fingerprint() == "owner/name test f00"
    assert [source.index for source in sources] == list(range(250, 300))
    assert (sources[0], sources[49]) == (Text(250, "250"), RawPrompt(299, "299"))


def test_well_known_data_sets_have_short_names(loaded: list[tuple[Any, ...]]) -> None:
    for name in ("ultrachat", "sharegpt", "magpie", "open-perfectblend"):
        open_prompts(name)

    assert loaded == [
        ("HuggingFaceH4/ultrachat_200k", "train_sft", None),
        (
            "anon8231489123/ShareGPT_Vicuna_unfiltered",
            "train",
            "ShareGPT_V3_unfiltered_cleaned_split.json",
        ),
        ("Magpie-Align/Magpie-Pro-300K-Filtered", "train", None),
        ("mlabonne/open-perfectblend", "train", None),
    ]


@pytest.mark.usefixtures("loaded")
def test_errors_of_the_hub_are_explained() -> None:
    with pytest.raises(SettingsError, match='`owner/name` has no split `no`: Unknown split "no"'):
        open_prompts("owner/name", split="no")
    with pytest.raises(MachineError, match="`some/private` cannot be loaded from the hub: offline"):
        open_prompts("some/private")


def test_the_fingerprint_is_of_contents_and_relative_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_lines(tmp_path / folder / "x/1.jsonl", [{"text": "A"}])
        write_lines(tmp_path / folder / "2.jsonl", [{"text": "B"}])
    before = open_prompts(str(tmp_path / "a")).fingerprint()

    assert open_prompts(str(tmp_path / "b")).fingerprint() == before

    write_lines(tmp_path / "b/2.jsonl", [{"text": "C"}])
    assert open_prompts(str(tmp_path / "b")).fingerprint() != before
    (tmp_path / "a/2.jsonl").rename(tmp_path / "a/3.jsonl")
    assert open_prompts(str(tmp_path / "a")).fingerprint() != before
