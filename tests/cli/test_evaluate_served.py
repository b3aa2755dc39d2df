"""`speculators evaluate` with a serving engine, as the user types it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from tests.cli.golden import assert_golden
from tests.embedded_verifier_map import FOR_EMBEDDED
from tests.tiny_drafts import make_config, write_draft
from tests.unit.engines.fakes import FakeVLLM, write_fake_vllm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")

Capture = pytest.CaptureFixture[str]
Evaluate = Callable[..., int]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return write_fake_vllm(tmp_path, monkeypatch)


@pytest.fixture
def evaluate(tmp_path: Path, vllm: FakeVLLM) -> Evaluate:
    """Runs the command with a random draft on short prompts, and further flags."""
    assert vllm.pids() == []
    config = make_config(**FOR_EMBEDDED)
    draft, file = write_draft(tmp_path / "draft", config), tmp_path / "prompts.jsonl"
    rows = [{"prompt": text[:12]} for text in read_prompts()[:4]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*flags: object) -> int:
        usual = ("--prompts", file, "--max-new-tokens", 8, "--engine", "vllm")
        return run(["evaluate", str(draft), *map(str, (*usual, *flags))])

    return call


def test_the_json_document_is_the_promised_one(
    evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    code = evaluate("--json", "--concurrency", "2,1,2", "--repeats", 2)

    report = json.loads(capsys.readouterr().out.replace(str(VERIFIER_DIR), "VERIFIER"))
    assert code == 0
    for found in report["throughput"]:
        low, high = found["speedup_range"]
        assert 0 < low <= found["speedup"] <= high
        assert len(found["tokens_per_second"]) == 2
        assert len(found["tokens_per_second_without_draft"]) == 2
        found |= {"tokens_per_second": [], "tokens_per_second_without_draft": []}
        found |= {"speedup": 0.0, "speedup_range": []}
    assert report["engine"]["vllm"] == "0.33.0"
    assert_golden(report | {"engine": {}, "duration_seconds": 0.0}, "evaluate-served", tmp_path)


def test_every_run_is_with_the_draft_and_then_without(evaluate: Evaluate, vllm: FakeVLLM) -> None:
    assert evaluate("--concurrency", "1,4", "--repeats", 3) == 0

    # One run that is counted and 2 times 3 timed ones, of 4 prompts, in each engine.
    requests = [note.split()[0] for note in vllm.notes("request ")]
    assert requests == ["0"] * 28 + ["1"] * 28
    starts = [json.loads(note) for note in vllm.notes("") if note.startswith("{")]
    assert [x["speculative_config"] is None for x in starts] == [False, True]
    assert starts[0]["speculative_config"]["num_speculative_tokens"] == 3


def test_tables_and_panel_show_the_figures(evaluate: Evaluate, capsys: Capture) -> None:
    code = evaluate("--min-acceptance-length", 3.5)

    out = capsys.readouterr().out
    assert code == 1
    for text in (
        "after accepted tokens",
        "requests at a time",
        "no counts by prompt",
        "identical to that without the draft",
        "`--min-acceptance-length` is 3.5",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "1,x"], "must be numbers from 1 on"),
        (["--concurrency", "0"], "must be numbers from 1 on"),
        (["--html", "page.html"], "`--html` needs the transformers engine"),
        (["--against", "other"], "`--against` needs the transformers engine"),
        (["--diagnose"], "`--diagnose` needs the transformers engine"),
        (["--batch-size", "2"], "`--batch-size` is of the transformers engine"),
        (["--endpoint", "http://localhost:1"], "exclude each other"),
        (["--engine", "transformers", "--vllm-args", "--seed 1"], "need `--engine vllm`"),
        (["--vllm-args", "--model other"], "is set by this command"),
        (["--vllm-python", "/missing/python"], "is not an executable file"),
    ],
)
def test_settings_that_cannot_be_used_are_exit_code_2(
    evaluate: Evaluate, flags: list[str], message: str, capsys: Capture
) -> None:
    assert evaluate(*flags) == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_without_vllm_is_exit_code_5(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("PYTHONPATH")

    assert evaluate() == 5
    assert "vLLM is not installed" in capsys.readouterr().err
