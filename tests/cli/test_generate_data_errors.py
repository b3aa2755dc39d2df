"""What `generate-data` refuses: exit code, message, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.capture import state_stage
from speculators_cli.core.capture.generated_folder import LOCK_NAME, GeneratedFolder
from speculators_cli.core.data.token_shards import read_shard
from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.engines.engine import CapturedStates
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.place import Place
from tests.chat_verifier import CHAT_TEMPLATE, write_chat_verifier, write_rows
from tests.full_disk import no_file_over
from tests.run_files import tree

Capture = pytest.CaptureFixture[str]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "def add(x):"}
ANSWER = {"role": "assistant", "content": "return x + 2"}
CHAT = {"messages": [USER, ANSWER]}
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
)
ANSWERING = ("--regenerate", "--max-new-tokens", 6)


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_verifier(tmp_path_factory.mktemp("chat") / "verifier")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def generate(
    tmp_path: Path, out: Path, verifier: Path, capsys: Capture
) -> Callable[..., tuple[int, str]]:
    """Run the command; returns its exit code and what it wrote for the user."""

    def run_it(*flags: object, rows: Any = (CHAT,), own: Path = verifier) -> tuple[int, str]:
        prompts = rows
        if not isinstance(rows, Path):
            prompts = write_rows(tmp_path / "rows.jsonl", rows)
        command = ["generate-data", prompts, "--verifier-name-or-path", own]
        command += ["--output-dir", out, "--device", "cpu", *flags]
        capsys.readouterr()
        code = run([str(part) for part in command])
        return code, capsys.readouterr().err

    return run_it


Generate = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("flags", [(), ANSWERING], ids=["given", "regenerate"])
def test_conversations_need_a_chat_template(
    out: Path, generate: Generate, flags: tuple[Any, ...]
) -> None:
    code, err = generate(*flags, own=VERIFIER_DIR)

    assert code == 2
    assert "has no chat template" in err
    assert "hint: Pass an instruction-tuned verifier, or rows with `text` or `prompt`" in err
    assert not list(out.rglob("*.safetensors"))
    # Nothing is left of that run that other rows could not follow.
    code, err = generate(own=VERIFIER_DIR, rows=[{"text": "def one(): pass"}])
    assert code == 0, err


def test_what_the_template_rejects_is_shown_with_the_message(
    tmp_path: Path, generate: Generate
) -> None:
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    own = write_chat_verifier(tmp_path / "strict", template=refuse + CHAT_TEMPLATE)
    rows = [{"messages": [SYSTEM, USER, ANSWER]}] * 3

    code, err = generate(rows=rows, own=own)

    assert code == 3
    assert "template error: No system role (3)" in err
    assert err.count("message 0 (system): Be brief.") == 2
    assert "hint: Change the messages" in err


def test_few_template_errors_are_counted(tmp_path: Path, out: Path, generate: Generate) -> None:
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    own = write_chat_verifier(tmp_path / "strict", template=refuse + CHAT_TEMPLATE)
    rows = [{"messages": [SYSTEM, USER, ANSWER]}, *[CHAT] * 20]

    code, err = generate(rows=rows, own=own)

    assert code == 0, err
    assert len(list(out.rglob("0*.pt"))) == 20


def test_a_verifier_needs_a_tokenizer(tmp_path: Path, out: Path, generate: Generate) -> None:
    own = write_chat_verifier(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).unlink()

    code, err = generate(own=own)

    assert code == 2
    assert f"`{own}` has no tokenizer" in err
    assert not out.exists()


def test_a_tokenizer_of_more_tokens_than_the_verifier_is_refused(
    tmp_path: Path, out: Path, generate: Generate
) -> None:
    own = write_chat_verifier(tmp_path / "grown")
    content = json.loads((own / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 2048, "content": "<|more|>"})
    (own / "tokenizer.json").write_text(json.dumps(content))

    code, err = generate(own=own)

    assert code == 2
    assert "has 2,049 tokens, its embedding 2,048" in err
    assert not out.exists()


def test_an_input_without_a_supervised_token_is_shown(generate: Generate) -> None:
    rows = [{"prompt": f"def f{i}"} for i in range(5)]

    code, err = generate(rows=rows)

    assert code == 3
    assert "No token of 5 rows is supervised: no answer (5)" in err
    assert "000000: no answer\n    def f0" in err
    assert "000001: no answer\n    def f1" in err
    assert "def f2" not in err
    assert "hint: Pass `--regenerate`" in err


def test_following_the_hint_of_a_failed_run_works(out: Path, generate: Generate) -> None:
    rows = [{"messages": [USER]}] * 3
    code, err = generate(rows=rows)
    assert (code, "hint: Pass `--regenerate`" in err) == (3, True)
    assert generate(rows=rows)[0] == 3  # again, by the shards that are there

    code, err = generate(*ANSWERING, rows=rows)

    assert code == 0, err
    assert len(list(out.rglob("0*.pt"))) == 3
    # Contents that are of use are not replaced.
    code, err = generate(rows=rows)
    assert (code, "was generated with other inputs" in err) == (2, True)


@pytest.mark.parametrize("flags", [(), ("--total-seq-len", 50)], ids=["verifier", "setting"])
def test_prompts_beyond_the_verifier_are_left_out(
    out: Path, generate: Generate, flags: tuple[Any, ...]
) -> None:
    long = {"prompt": "def add " * 600}  # 1,200 tokens; the verifier has 1,024 positions

    code, err = generate(*ANSWERING, *flags, rows=[long])

    assert code == 3
    assert "prompt longer than the maximum length (1)" in err
    assert "hint: Pass a higher `--total-seq-len`" in err
    assert not list(out.rglob("*.pt"))


def test_few_prompts_beyond_the_verifier_do_not_stop_the_others(
    out: Path, generate: Generate
) -> None:
    rows = [{"prompt": "def add " * 600}, {"prompt": "def add(x):"}]

    code, err = generate(*ANSWERING, rows=rows)

    assert code == 0, err
    assert [file.stem for file in out.rglob("0*.pt")] == ["000001"]


def test_rows_end_at_the_verifiers_last_position(out: Path, generate: Generate) -> None:
    code, err = generate("--tokens-only", rows=[{"text": "def add " * 600}])

    assert code == 0, err
    (row,) = read_shard(GeneratedFolder(out).shard(0)).rows
    assert len(row.input_ids) == 1024


def test_bad_lines_are_listed_with_their_number(
    tmp_path: Path, out: Path, verifier: Path, capsys: Capture
) -> None:
    ids = {"input_ids": [1, 2, 5000], "loss_mask": [0, 1, 1]}
    prompts = write_rows(tmp_path / "rows.jsonl", [CHAT, '{"prompt":', CHAT, {"x": 1}, ids])
    command = ["generate-data", prompts, "--verifier-name-or-path", verifier, "--json"]
    command += ["--output-dir", out, "--device", "cpu", "--max-bad-rows", 3]

    code = run([str(part) for part in command])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["num_bad_rows"], report["num_conversations"], report["num_samples"]) == (3, 5, 2)
    assert [row.split(", ")[1][:7] for row in report["bad_rows"]] == [
        "line 2 ",
        "line 4 ",
        "line 5 ",
    ]
    assert "5000, outside of the vocabulary of 2,048" in report["bad_rows"][2]


@pytest.mark.parametrize("flags", [(), ("--max-bad-rows", 1)], ids=["share", "number"])
def test_too_many_bad_lines_are_an_error(
    out: Path, generate: Generate, flags: tuple[Any, ...]
) -> None:
    code, err = generate(*flags, rows=[CHAT, "{", CHAT, "[]", CHAT])

    assert code == 3
    assert "2 of 5 rows cannot be used" in err
    assert "line 2 is not JSON" in err
    assert "line 4 is not an object" in err
    assert not list(out.rglob("*.pt"))


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("missing.jsonl", None, 2),
        ("empty.jsonl", "", 3),
        ("blank.jsonl", "\n\n", 3),
        ("a.txt", "x", 2),
    ],
)
def test_inputs_without_rows_are_refused(
    tmp_path: Path, out: Path, generate: Generate, name: str, content: str | None, code: int
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)

    found, err = generate(rows=file)

    assert found == code, err
    assert name in err
    assert "hint: " in err
    assert not list(out.rglob("*.safetensors"))


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Whatever happens in the block, the folder stays as it is."""
    before = tree(folder)
    assert before
    yield
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--seed", 1), "seed: `0` then, `1` now"),
        (("--temperature", 0.5), "temperature: `0.0` then, `0.5` now"),
        (("--total-seq-len", 64), "total_seq_len: `8192` then, `64` now"),
        (("--shard-size", 1), "shard_size: `512` then, `1` now"),
        (("--storage-dtype", "float8"), "storage_dtype: `auto` then, `float8` now"),
        (("--all-last-states",), "all_last_states: `False` then, `True` now"),
        (("--target-layer-ids", "1,2,3"), "layer_ids: `[2, 4, 5]` then, `[1, 2, 3]` now"),
        (("--dtype", "bfloat16"), "dtype: `float32` then, `bfloat16` now"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_folder_of_other_flags_is_refused_with_the_difference(
    out: Path, generate: Generate, flags: tuple[Any, ...], named: str
) -> None:
    assert generate(*ANSWERING)[0] == 0

    with unchanged(out):
        code, err = generate(*ANSWERING, *flags)

    assert code == 2
    assert named in err
    assert "hint: Choose another `--output-dir`" in err


def test_every_rank_refuses_a_folder_of_other_flags(
    out: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate()[0] == 0
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)

    with unchanged(out):
        code, err = generate("--shard-size", 1)

    assert code == 2
    assert "shard_size: `512` then, `1` now" in err


def test_a_folder_of_another_verifier_is_refused(
    tmp_path: Path, out: Path, generate: Generate
) -> None:
    assert generate()[0] == 0
    other = write_chat_verifier(tmp_path / "other")

    with unchanged(out):
        code, err = generate(own=other)

    assert code == 2
    assert f"`{other}` now" in err


def test_a_verifier_that_has_changed_in_place_is_refused(
    tmp_path: Path, out: Path, generate: Generate
) -> None:
    own = write_chat_verifier(tmp_path / "own")
    assert generate(own=own)[0] == 0
    weights = own / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with unchanged(out):
        code, err = generate(own=own)

    assert code == 2
    assert "weights: `" in err


def test_changed_prompts_are_refused(out: Path, generate: Generate) -> None:
    assert generate()[0] == 0

    with unchanged(out):
        code, err = generate(rows=[CHAT, CHAT])

    assert code == 2
    assert "prompts: `" in err


def test_a_folder_with_other_files_is_refused(out: Path, generate: Generate) -> None:
    (out / "samples").mkdir(parents=True)
    (out / "samples" / "data_0.pt").write_bytes(b"mine")

    code, err = generate()

    assert code == 2
    assert "has files that `generate-data` did not write" in err
    assert (out / "samples" / "data_0.pt").read_bytes() == b"mine"


def test_a_folder_in_use_is_refused_with_the_process(out: Path, generate: Generate) -> None:
    with GeneratedFolder(out).locked(Place()):
        code, err = generate()

    assert code == 2
    assert f"is being written by process {os.getpid()} on" in err
    assert generate()[0] == 0


# The shard of four conversations has 0.8 kB, a sample 30 kB.
@pytest.mark.parametrize(
    ("num_bytes", "flags"),
    [(0, ()), (100, ()), (700, ANSWERING), (2_000, ()), (20_000, ANSWERING)],
    ids=str,
)
def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, out: Path, generate: Generate, num_bytes: int, flags: tuple[Any, ...]
) -> None:
    rows = write_rows(tmp_path / "given.jsonl", [CHAT] * 4)
    assert generate(*flags, rows=rows)[0] == 0
    whole = tree(out)
    out.rename(tmp_path / "whole")

    with no_file_over(num_bytes):
        code, err = generate(*flags, rows=rows)

    assert code == 5, err
    assert "cannot be written: File too large" in err
    assert "hint: Free disk space" in err
    assert tree(out).items() < whole.items()
    code, err = generate(*flags, rows=rows)
    assert code == 0, err
    assert tree(out) == whole


def test_too_little_room_is_told_before_the_first_sample(
    out: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20 + 1000))

    code, err = generate()

    assert code == 5
    assert "free, the set of samples needs " in err
    assert not list(out.rglob("0*.pt"))
    assert list(out.rglob("*.safetensors"))


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[CapturedStates], object]) -> None:
    """Change every captured state."""
    capture = TransformersEngine.capture

    def changed(engine: TransformersEngine, packed: Any) -> CapturedStates:
        found = capture(engine, packed)
        states = CapturedStates(found.aux.clone(), found.last.clone())
        change(states)
        return states

    monkeypatch.setattr(TransformersEngine, "capture", changed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda states: states.aux[:, :128].zero_(), "layer 2 are zero"),
        (lambda states: states.last.copy_(states.last.flip(0)), "The LM head over captured"),
    ],
    ids=["zeros", "order"],
)
def test_states_that_cannot_be_right_stop_the_run(
    out: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch, change: Any, named: str
) -> None:
    plant(monkeypatch, change)

    code, err = generate(rows=[{"text": "def add(x):\n    return x + 2\n" * 4}])

    assert code == 5
    assert named in err
    assert "hint: Try the other `--engine`" in err
    assert not list(out.rglob("0*.pt"))


@pytest.mark.parametrize(("num_broken", "code"), [(1, 0), (20, 5)])
def test_samples_with_states_that_are_not_finite_are_left_out_unless_many(
    out: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch, num_broken: int, code: int
) -> None:
    monkeypatch.setattr(state_stage.StateStage, "_check_first", lambda *_: None)
    plant(monkeypatch, lambda states: states.aux[: num_broken * 25 - 12, 0].fill_(float("nan")))
    rows = [{"input_ids": list(range(5, 30)), "loss_mask": [0, *[1] * 24]}] * 30

    found, err = generate(rows=rows)

    assert found == code, err
    assert len(list(out.rglob("0*.pt"))) == 30 - num_broken
    if code:
        assert "20 of 30 samples have hidden states that are not finite" in err
        assert not list(out.rglob("done.json"))


def test_a_run_that_ctrl_c_stops_keeps_what_is_whole_and_goes_on(
    tmp_path: Path, out: Path, verifier: Path, generate: Generate
) -> None:
    rows = write_rows(tmp_path / "many.jsonl", [CHAT] * 16)
    flags = ("--shard-size", 2, "--regenerate", "--max-new-tokens", 60)
    command = [sys.executable, "-m", "speculators_cli", "generate-data", rows, *flags]
    command += ["--verifier-name-or-path", verifier, "--output-dir", out, "--device", "cpu"]
    with subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(list(out.rglob("*.safetensors"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    stopped = tree(out)
    code, err = generate(*flags, rows=rows)
    assert code == 0, err
    finished = tree(out)
    whole = {name for name in stopped if "/." not in name and name != LOCK_NAME}
    assert {name: stopped[name] for name in whole} == {name: finished[name] for name in whole}
    assert 2 <= len(whole) < len(finished)
    assert len(list(out.rglob("0*.pt"))) == 16


def test_flags_that_change_nothing_are_refused(out: Path, generate: Generate) -> None:
    code, err = generate("--temperature", 0.5)

    assert code == 2
    assert "`--temperature` needs `--regenerate`" in err
    assert not out.exists()


@pytest.mark.parametrize("ids", ["5,2", "1,1", "2,9"])
def test_layers_that_the_verifier_lacks_are_refused(
    out: Path, generate: Generate, ids: str
) -> None:
    code, err = generate("--target-layer-ids", ids)

    assert code == 2
    assert "`--target-layer-ids`" in err
    assert not out.exists()
