"""`speculators generate-data` as the user types it, with the embedded verifier."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from speculators_cli.cli.app import run
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.data.token_shards import read_shard
from speculators_cli.core.demo.demo import read_prompts
from tests.chat_verifier import write_chat_verifier, write_rows
from tests.fork_server import ForkServer
from tests.generated_samples import sample_files
from tests.run_files import tree

Capture = pytest.CaptureFixture[str]
Row = Mapping[str, Any]
LAYER_IDS = (2, 4, 5)  # the default of 8 layers
MAX_NEW_TOKENS = 12
ANSWERING = ("--regenerate", "--max-new-tokens", MAX_NEW_TOKENS)
# Of the largest state: sums of float32 in another order, over eight layers.
TOLERANCE = 1e-5
KEYS = [
    *("output_dir", "verifier", "layer_ids", "num_conversations", "num_bad_rows", "bad_rows"),
    *("num_rows", "num_tokens", "num_supervised_tokens", "num_truncated_answers"),
    *("num_truncated_rows", "left_out", "num_samples", "num_non_finite", "head_agreement"),
    *("num_bytes", "supervised_share", "tokens_seconds", "tokens_tokens_per_second"),
    *("states_seconds", "states_tokens_per_second"),
]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


# One of each kind, with answers of their own.
GIVEN: Sequence[Row] = (
    {"messages": [user("Add two."), assistant("x + 2"), user("Three?"), assistant("x + 3")]},
    {"conversations": [{"from": "human", "value": "Sum?"}, {"from": "gpt", "value": "a + b"}]},
    {"text": "def test_one(self):\n    pass"},
    {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 0, 1]},
)


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_verifier(tmp_path_factory.mktemp("chat") / "verifier")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five prompts, of which one has two turns."""
    texts = read_prompts()[:4]
    two_turns = {"messages": [user("def one():"), assistant("old"), user("def two():")]}
    return write_rows(
        tmp_path / "prompts.jsonl", [*({"prompt": text} for text in texts), two_turns]
    )


@pytest.fixture
def generate(tmp_path: Path, verifier: Path, capsys: Capture) -> Callable[..., Any]:
    """Run the command into a folder below `tmp_path`; returns its report."""

    def run_it(prompts: Path, *flags: object, out: str = "out") -> dict[str, Any]:
        command = ["generate-data", prompts, "--verifier-name-or-path", verifier]
        command += ["--output-dir", tmp_path / out, "--device", "cpu", *flags, "--json"]
        capsys.readouterr()
        code = run([str(part) for part in command])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        report: dict[str, Any] = json.loads(shown.out)
        return report

    return run_it


def read(file: Path) -> Sample:
    return FORMATS["v1"].read_sample(file)


def supervised_text(verifier: Path, sample: Sample) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(verifier)
    return str(tokenizer.decode(sample.input_ids[sample.loss_mask.bool()]))


def test_rows_of_every_kind_become_samples(
    tmp_path: Path, verifier: Path, generate: Callable[..., Any]
) -> None:
    report = generate(write_rows(tmp_path / "rows.jsonl", GIVEN))

    files = sample_files(tmp_path / "out")
    samples = [read(file) for file in files]
    assert [file.stem for file in files] == ["000000", "000001", "000002", "000003"]
    assert [supervised_text(verifier, sample) for sample in samples[:3]] == [
        "x + 2<|end|>x + 3<|end|>", "a + b<|end|>", "def test_one(self):\n    pass",
    ]  # fmt: skip
    assert samples[3].input_ids.tolist() == [5, 6, 7, 8, 9]
    assert samples[3].loss_mask.tolist() == [False, False, True, False, True]
    assert ["schema_version", "command", *KEYS] == list(report)
    counts = [report[key] for key in ("num_conversations", "num_rows", "num_samples")]
    assert counts == [4, 4, 4]
    assert report["num_tokens"] == sum(len(sample.input_ids) for sample in samples)
    masks = torch.cat([sample.loss_mask for sample in samples])
    assert report["num_supervised_tokens"] == int(masks.sum())
    assert report["supervised_share"] == pytest.approx(int(masks.sum()) / len(masks))
    assert report["layer_ids"] == list(LAYER_IDS)
    assert report["head_agreement"] == 1.0
    assert report["left_out"] == {}
    assert report["num_bytes"] == sum(
        file.stat().st_size for file in [*files, *(tmp_path / "out/tokens").glob("*.safetensors")]
    )


@pytest.mark.parametrize(
    ("flags", "layer_ids"),
    [
        (("--algorithm", "dflash"), [2, 3, 4, 5, 6]),
        (("--algorithm", "dspark", "--target-layer-ids", "1,7"), [1, 7]),
    ],
)
def test_an_algorithm_has_layers_of_its_own(
    flags: tuple[str, ...], layer_ids: list[int], tmp_path: Path, generate: Callable[..., Any]
) -> None:
    report = generate(write_rows(tmp_path / "rows.jsonl", GIVEN), *flags)

    sample = read(sample_files(tmp_path / "out")[0])
    assert report["layer_ids"] == layer_ids
    assert len(sample.aux_hidden_states) == len(layer_ids)


def test_samples_have_transformers_own_states(
    tmp_path: Path, verifier: Path, generate: Callable[..., Any]
) -> None:
    generate(write_rows(tmp_path / "rows.jsonl", GIVEN))

    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    for file in sample_files(tmp_path / "out"):
        sample = read(file)
        before_norm: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _, given, found=before_norm: found.append(given[0][0])
        )
        with torch.no_grad():
            states = model(sample.input_ids[None], output_hidden_states=True).hidden_states
        hook.remove()
        for found, layer_id in zip(sample.aux_hidden_states, LAYER_IDS, strict=True):
            exact = states[layer_id][0]
            atol = TOLERANCE * float(exact.abs().max())
            torch.testing.assert_close(found[:], exact, rtol=0, atol=atol)
        assert isinstance(sample.last_hidden_states, SupervisedRows)
        exact = before_norm[0][sample.loss_mask.bool()]
        atol = TOLERANCE * float(exact.abs().max())
        torch.testing.assert_close(sample.last_hidden_states.held[:], exact, rtol=0, atol=atol)
        assert not sample.is_normed


def test_answers_are_the_verifiers_most_probable_tokens(
    tmp_path: Path, verifier: Path, prompts: Path, generate: Callable[..., Any]
) -> None:
    report = generate(prompts, *ANSWERING)

    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    num_answered = 0
    for file in sample_files(tmp_path / "out"):
        sample = read(file)
        mask = sample.loss_mask.bool()
        with torch.no_grad():
            best = model(sample.input_ids[None]).logits[0].argmax(-1)
        assert torch.equal(best[:-1][mask[1:]], sample.input_ids[1:][mask[1:]])
        num_answered += int(mask.sum())
    assert num_answered == report["num_supervised_tokens"] > 20
    assert report["num_samples"] >= 5
    last = sample_files(tmp_path / "out")[-1]
    assert "old" not in supervised_text(verifier, read(last))


def write_as(kind: str, rows: Sequence[Row], folder: Path) -> Path:
    """The same rows as another kind of file."""
    if kind == "jsonl":
        return write_rows(folder / "rows.jsonl", rows)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    if kind == "parquet":
        # A table has the columns of all rows.
        names = [key for row in rows for key in row]
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pq.write_table(table, folder / "rows.parquet")
        return folder / "rows.parquet"
    parts = folder / "parts"
    (parts / "b").mkdir(parents=True)
    write_rows(parts / "a.jsonl", rows[:3])
    write_as("parquet", rows[3:], parts / "b")
    return parts


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_the_kind_of_file_makes_no_difference(
    tmp_path: Path, generate: Callable[..., Any], kind: str
) -> None:
    shards = []
    for each in ("jsonl", kind):
        (tmp_path / each).mkdir()
        rows = write_as(each, GIVEN, tmp_path / each)
        generate(rows, "--tokens-only", out=f"out-{each}")
        shards.append((tmp_path / f"out-{each}/tokens/tokens-00000.safetensors").read_bytes())

    assert shards[0] == shards[1]


def test_tokens_first_and_states_later_are_what_one_run_writes(
    tmp_path: Path, prompts: Path, generate: Callable[..., Any]
) -> None:
    generate(prompts, *ANSWERING, out="whole")

    tokens = generate(prompts, *ANSWERING, "--tokens-only")
    after_tokens = tree(tmp_path / "out")
    generate(prompts, *ANSWERING)

    assert tokens["num_samples"] is None
    assert tokens["states_tokens_per_second"] is None
    assert sorted(after_tokens) == ["tokens/manifest.json", "tokens/tokens-00000.safetensors"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_second_run_changes_nothing(
    tmp_path: Path, prompts: Path, generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(prompts, *ANSWERING)
    before = tree(tmp_path / "out")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("0*.pt")}

    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("the verifier is loaded although nothing is left to do")

    monkeypatch.setattr("speculators_cli.core.capture.engines.load_model", load_model)
    second = generate(prompts, *ANSWERING)

    assert tree(tmp_path / "out") == before
    assert {f: f.stat().st_mtime_ns for f in times} == times
    assert second["tokens_tokens_per_second"] is second["states_tokens_per_second"] is None
    same = set(KEYS) - {"head_agreement"} - {key for key in KEYS if "_second" in key}
    assert {key: second[key] for key in same} == {key: first[key] for key in same}


def test_shards_hold_as_many_conversations_as_asked_for(
    tmp_path: Path, prompts: Path, generate: Callable[..., Any]
) -> None:
    report = generate(prompts, *ANSWERING, "--shard-size", 2)

    shards = sorted((tmp_path / "out/tokens").glob("*.safetensors"))
    names = [[row.name[:6] for row in read_shard(file).rows] for file in shards]
    assert [sorted(set(of_shard)) for of_shard in names] == [
        ["000000", "000001"], ["000002", "000003"], ["000004"],
    ]  # fmt: skip
    for number, file in enumerate(shards):
        written = {path.stem for path in (tmp_path / f"out/samples/{number:05d}").glob("*.pt")}
        assert written == {row.name for row in read_shard(file).rows}
    assert report["num_conversations"] == 5
    first = generate(prompts, *ANSWERING, "--max-conversations", 3, "--shard-size", 2, out="few")
    assert first["num_conversations"] == 3
    assert sorted((tmp_path / "few/samples").glob("0*")) == [
        tmp_path / "few/samples/00000", tmp_path / "few/samples/00001",
    ]  # fmt: skip


def test_answers_do_not_depend_on_the_shard(
    tmp_path: Path, prompts: Path, generate: Callable[..., Any]
) -> None:
    sampled = ("--temperature", 1.2, "--top-p", 0.9, "--seed", 5)
    for size in (1, 512):
        generate(
            prompts, *ANSWERING, *sampled, "--shard-size", size, "--tokens-only", out=f"{size}"
        )

    rows = {
        size: {
            row.name: (row.input_ids.tolist(), row.loss_mask.tolist())
            for file in sorted((tmp_path / str(size) / "tokens").glob("*.safetensors"))
            for row in read_shard(file).rows
        }
        for size in (1, 512)
    }
    assert rows[1] == rows[512]
    other = generate(prompts, *ANSWERING, *sampled[:4], "--seed", 6, "--tokens-only", out="other")
    assert other["num_rows"] >= 5
    assert tree(tmp_path / "other/tokens") != tree(tmp_path / "512/tokens")


def test_two_ranks_write_what_one_does(
    fork_server: ForkServer, tmp_path: Path, verifier: Path, prompts: Path,
    generate: Callable[..., Any],
) -> None:  # fmt: skip
    flags = (*ANSWERING, "--shard-size", 2)
    one = generate(prompts, *flags, out="one")
    command = ["generate-data", prompts, *flags, "--verifier-name-or-path", verifier]
    command += ["--output-dir", tmp_path / "two", "--device", "cpu", "--json"]

    done = fork_server.run("speculators_cli", *command, num_ranks=2)

    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    same = set(KEYS) - {"output_dir"} - {key for key in KEYS if "_second" in key}
    assert {key: two[key] for key in same} == {key: one[key] for key in same}


def test_a_rank_without_a_shard_ends_without_an_error(
    tmp_path: Path, verifier: Path, prompts: Path, generate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    generate(prompts, *ANSWERING)
    before = tree(tmp_path / "out")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    command = ["generate-data", prompts, "--verifier-name-or-path", verifier, *ANSWERING]
    command += ["--output-dir", tmp_path / "out", "--device", "cpu", "--json"]
    code = run([str(part) for part in command])

    shown = capsys.readouterr()
    assert (code, shown.out) == (0, ""), shown.err
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    "storage",
    [(), ("--storage-dtype", "bfloat16", "--all-last-states"), ("--storage-dtype", "float8")],
    ids=lambda flags: " ".join(flags) or "auto",
)
def test_samples_can_be_inspected_and_trained_on(
    tmp_path: Path, verifier: Path, generate: Callable[..., Any], capsys: Capture,
    storage: tuple[str, ...],
) -> None:  # fmt: skip
    texts = read_prompts()[:10]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in texts])
    generate(rows, *ANSWERING, *storage)
    data, maps, save = tmp_path / "out", tmp_path / "maps", tmp_path / "run"
    own = ("--verifier-name-or-path", verifier)

    def speculators(*command: object) -> Any:
        capsys.readouterr()
        code = run([*map(str, command), "--json"])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return json.loads(shown.out)

    inspected = speculators("inspect-data", data, *own)
    maps.mkdir()
    speculators(
        *("build-vocab-map", "--data-path", data, *own, "--draft-vocab-size", 64),
        *("--output-dir", maps),
    )
    trained = speculators(
        *("train", *own, "--data-path", data, "--save-path", save, "--total-seq-len", 128),
        *("--d2t-path", maps / "d2t.npy", "--t2d-path", maps / "t2d.npy", "--max-steps", 2),
        *("--device", "cpu"),
    )

    assert inspected["problems"] == []
    assert inspected["num_samples"] == 10
    assert inspected["layer_ids"] == list(LAYER_IDS)
    assert not inspected["are_layer_ids_assumed"]
    # Float8 moves the top-1 token where two are nearly equal.
    assert inspected["agreement"]["with_norm"] >= (0.95 if "float8" in storage else 0.99)
    assert trained["num_bad_samples"] == 0
    assert trained["step"] == 2
    assert trained["target_layer_ids"] == list(LAYER_IDS)


def test_layers_are_those_that_are_asked_for(
    tmp_path: Path, verifier: Path, generate: Callable[..., Any]
) -> None:
    report = generate(write_rows(tmp_path / "r.jsonl", GIVEN), "--target-layer-ids", "0,3,8")

    sample = read(sample_files(tmp_path / "out")[2])
    assert report["layer_ids"] == [0, 3, 8]
    first, _, final = sample.aux_hidden_states
    # All tokens of a text are supervised.
    assert torch.equal(final[:][1:], sample.last_hidden_states[torch.arange(1, len(final))])
    embedding = AutoModelForCausalLM.from_pretrained(
        verifier, dtype=torch.float32
    ).model.embed_tokens.weight
    assert torch.equal(first[:], embedding[sample.input_ids])


def test_a_report_for_people_says_what_to_run_next(
    tmp_path: Path, verifier: Path, prompts: Path, capsys: Capture
) -> None:
    command = ["generate-data", prompts, "--verifier-name-or-path", verifier, *ANSWERING]
    command += ["--output-dir", tmp_path / "out", "--device", "cpu"]

    assert run([str(part) for part in command]) == 0

    shown = capsys.readouterr()
    assert "speculators build-vocab-map --data-path" in shown.err
    assert "speculators train" in shown.err
    text = " ".join(shown.out.split())
    assert "5 rows" in text
    assert "aux layers 2, 4, 5" in text


@pytest.mark.parametrize("flag", [("--dry-run",), ("--show-masks", "2")], ids=lambda x: x[0])
def test_what_only_looks_writes_nothing(
    tmp_path: Path, generate: Callable[..., Any], flag: tuple[str, ...]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", GIVEN)
    before = tree(tmp_path)

    report = generate(rows, *flag)

    assert report
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_estimate_counts_operations_and_float8(
    tmp_path: Path, generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators_cli.core.capture.estimate.measure_matmul", lambda *_: 1e12)
    rows = write_rows(tmp_path / "rows.jsonl", GIVEN)

    found = generate(rows, "--dry-run")
    in_float8 = generate(rows, "--dry-run", "--compute-dtype", "float8")

    speed = found["capture_tokens_per_second"]
    # Half of the speed of matrix products; 8 layers, width 128, 4 and 2 heads of 32, 384 inside.
    num_weights = 8 * (2 * 128 * 32 * (4 + 2) + 3 * 128 * 384)
    assert speed == pytest.approx(0.5 * 1e12 / (2 * num_weights))
    assert found["capture_seconds"] == pytest.approx(found["num_tokens"] / speed)
    assert in_float8["capture_tokens_per_second"] == pytest.approx(1.65 * speed)


def test_a_sampled_answer_is_repeated_by_its_seed(
    tmp_path: Path, prompts: Path, generate: Callable[..., Any]
) -> None:
    flags = (*ANSWERING, "--temperature", 1.5, "--seed", 3, "--tokens-only")
    for out in ("first", "second"):
        generate(prompts, *flags, out=out)
    generate(prompts, *ANSWERING, "--tokens-only", out="greedy")

    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    shard = "tokens-00000.safetensors"
    assert (tmp_path / "first/tokens" / shard).read_bytes() != (
        tmp_path / "greedy/tokens" / shard
    ).read_bytes()
