"""`speculators train` from conversations, and from tokens, without stored hidden states."""

import json
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from tests.run_files import tree
from tests.tiny_run import TinyInputs
from tests.tiny_tokenizer import add_tokenizer

NO_MAPS: dict[str, object] = {"d2t_path": None, "t2d_path": None}


@pytest.fixture
def verifier(tiny: TinyInputs) -> Path:
    return add_tokenizer(tiny.verifier_dir, tiny.folder / "with-tokenizer")


def write_chats(file: Path, *, count: int = 24, first: int = 0) -> Path:
    rows = []
    for i in range(first, first + count):
        asked = " ".join(f"w{(i * 7 + k) % 33}" for k in range(3 + i % 5))
        answer = " ".join(f"w{(i * 5 + k * k) % 33}" for k in range(6 + i % 11))
        rows.append({"messages": [{"role": "user", "content": asked},
                                  {"role": "assistant", "content": answer}]})  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_command_from_conversations_equals_three(
    verifier: Path, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, made = write_chats(tiny.folder / "chats.jsonl"), tiny.folder / "made"
    common = {"verifier_name_or_path": verifier, "epochs": 1, "scheduler": "none"}
    maps = {"d2t_path": made / "d2t.npy", "t2d_path": made / "t2d.npy"}
    of_verifier = ["--verifier-name-or-path", str(verifier)]
    generate = ["generate-data", str(chats), *of_verifier, "--output-dir", str(made)]
    generate += ["--tokens-only", "--device", "cpu", "--total-seq-len", "64"]
    build = ["build-vocab-map", *of_verifier, "--data-path", str(made), "--output-dir", str(made)]
    build += ["--draft-vocab-size", "20"]

    one = run(["train", *tiny.flags(data_path=chats, save_path=tiny.folder / "one",
                                    draft_vocab_size=20, **NO_MAPS, **common)])  # fmt: skip
    output = capsys.readouterr()
    two = run(generate), run(build)
    three = run(["train", *tiny.flags(data_path=made, save_path=tiny.folder / "three",
                                      capture="online", **maps, **common)])  # fmt: skip

    assert (one, two, three) == (0, (0, 0), 0)
    assert "capture" in output.out
    assert "The draft vocabulary keeps 20 of " in output.err
    ends = [(tiny.folder / x / "0" / "model.safetensors").read_bytes() for x in ("one", "three")]
    assert ends[0] == ends[1]
    assert (
        json.loads((tiny.folder / "one" / "0" / "config.json").read_text())["draft_vocab_size"]
        == 20
    )


def test_the_vocabulary_of_a_run_stays_when_another_size_is_refused(
    verifier: Path, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tiny.folder / "chats.jsonl")
    flags = ["train", *tiny.flags(data_path=chats, verifier_name_or_path=verifier, **NO_MAPS)]
    flags += ["--epochs", "1"]

    codes = [
        run([*flags, "--draft-vocab-size", size, "--max-steps", steps])
        for size, steps in (("20", "1"), ("25", "2"), ("20", "2"))
    ]

    assert codes == [0, 4, 0]
    err = capsys.readouterr().err
    assert "trained with another draft vocabulary" in err
    assert "hint: Pass the same `--draft-vocab-size`" in err


def test_a_run_from_conversations_is_resumed_by_the_same_command(
    verifier: Path, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tiny.folder / "chats.jsonl")
    flags = ["train", *tiny.flags(data_path=chats, verifier_name_or_path=verifier, epochs=1)]

    assert run([*flags, "--max-steps", "2"]) == 0
    tokens = tree(tiny.save_path / "tokens")
    assert run(flags) == 0

    assert "Resuming from" in capsys.readouterr().err
    assert tree(tiny.save_path / "tokens") == tokens
    assert any(name.endswith(".safetensors") for name in tokens)


def test_other_conversations_do_not_mix_with_those_of_the_save_path(
    verifier: Path, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tiny.folder / "chats.jsonl")
    flags = tiny.flags(data_path=chats, verifier_name_or_path=verifier, epochs=1, max_steps=1)
    assert run(["train", *flags]) == 0
    write_chats(chats, first=3)

    code = run(["train", *flags])

    assert code == 2
    err = capsys.readouterr().err
    assert "`--save-path`" in err
    assert "was generated with other inputs" in err
    assert "--output-dir" not in err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--capture", "stored"], "has no hidden states"),
        (["--draft-vocab-size", "20", "--full-vocab"], "cannot both be given"),
        (["--dry-run"], "has conversations, which are not tokens yet"),
        (["--plan"], "has conversations, which are not tokens yet"),
    ],
)
def test_conversations_are_refused_where_nothing_may_be_written(
    verifier: Path,
    tiny: TinyInputs,
    more: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chats = write_chats(tiny.folder / "chats.jsonl")

    code = run(["train", *tiny.flags(data_path=chats, verifier_name_or_path=verifier), *more])

    assert code == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not tiny.save_path.exists()


def test_a_vocabulary_is_counted_in_conversations_only(
    tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["train", *tiny.flags(draft_vocab_size=20)])

    assert code == 2
    assert "needs a file of conversations" in capsys.readouterr().err
    assert not tiny.save_path.exists()
