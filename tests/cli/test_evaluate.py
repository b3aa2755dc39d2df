"""`speculators evaluate` as the user types it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from speculators_cli.cli.app import run
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from tests.cli.golden import assert_golden
from tests.embedded_verifier_map import FOR_EMBEDDED
from tests.tiny_dflash import make_block_config
from tests.tiny_drafts import make_config, read_folder, write_draft, write_folder

Capture = pytest.CaptureFixture[str]
Evaluate = Callable[..., int]


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A random draft for the embedded verifier."""
    config = make_config(**FOR_EMBEDDED)
    return write_draft(tmp_path / "draft", config)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts of two categories."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "category": "ab"[i % 2]} for i, text in enumerate(read_prompts()[:4])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def evaluate(draft: Path, prompts: Path) -> Evaluate:
    """Runs the command with flags in place of or beside the usual ones."""

    def call(*flags: object, checkpoint: Path = draft, given: Path = prompts) -> int:
        usual = ("--prompts", given, "--max-new-tokens", 8, "--device", "cpu")
        return run(["evaluate", str(checkpoint), *map(str, (*usual, *flags))])

    return call


def test_the_json_document_is_the_promised_one(
    evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    code = evaluate("--json", "--against", tmp_path / "draft", "--num-speculative-tokens", 2)

    report = json.loads(capsys.readouterr().out.replace(str(VERIFIER_DIR), "VERIFIER"))
    assert code == 0
    measured = ("draft_seconds_per_pass", "verify_seconds_per_pass", "duration_seconds")
    assert all(report[key] > 0 for key in measured)
    assert [x is None for x in report["predicted_speedup"]] == [False] * 2 + [True] * 6
    assert report["is_lossless"]
    timed = dict.fromkeys(measured, 0.0) | {
        "predicted_speedup": [],
        "best_num_speculative_tokens": 0,
    }
    assert_golden(report | timed, "evaluate", tmp_path)


def test_tables_and_panel_show_the_figures(evaluate: Evaluate, capsys: Capture) -> None:
    code = evaluate("--num-speculative-tokens", 2, "--temperature", 0.5)

    out = capsys.readouterr().out
    assert code == 0
    for text in (
        "after accepted tokens",
        "category",
        "acceptance length",
        "verifier passes of 2 draft tokens",
        "identical to the verifier's own",
    ):
        assert text in out


def test_the_page_has_the_figures_and_nothing_from_elsewhere(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    page = tmp_path / "pages/report.html"

    assert evaluate("--html", page) == 0

    text = page.read_text("utf-8")
    assert "1.00 tokens per verifier pass" in text
    assert text.count("<svg") == 5
    assert read_prompts()[0].splitlines()[0][:20] in text
    assert not re.search(r"https?://|<script|<link|src=", text)
    assert list(page.parent.iterdir()) == [page]


def test_a_folder_in_place_of_the_page_is_exit_code_2(
    evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    assert evaluate("--html", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_diagnosis_ranks_changes(evaluate: Evaluate, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "report.html"

    assert evaluate("--diagnose", "--html", page, "--max-new-tokens", 12) == 0

    out = capsys.readouterr().out
    assert "may be wrong" in out
    assert "No change gains beyond chance" in out
    assert "Changes that were tried" in page.read_text("utf-8")
    assert evaluate("--diagnose", "--max-new-tokens", 12, "--json") == 0
    found = json.loads(capsys.readouterr().out)["diagnosis"]
    names = {cause["cause"] for cause in found["causes"]}
    assert names >= {"layer ids", "norm_before_residual", "norm_output", "rope"}
    assert [x["gain"] for x in found["causes"]] == sorted(
        (x["gain"] for x in found["causes"]), reverse=True
    )


def test_answers_too_short_to_diagnose_are_no_error(evaluate: Evaluate) -> None:
    assert evaluate("--diagnose", "--max-new-tokens", 3) == 0


def test_too_short_an_acceptance_length_is_exit_code_1(evaluate: Evaluate, capsys: Capture) -> None:
    assert evaluate("--min-acceptance-length", 3.9) == 1
    assert "`--min-acceptance-length` is 3.9" in capsys.readouterr().out
    assert evaluate("--min-acceptance-length", 1.0) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-speculative-tokens", "9"], "must be less than or equal to 8"),
        (["--num-speculative-tokens", "0"], "must be greater than or equal to 1"),
        (["--max-new-tokens", "1"], "must be greater than or equal to 2"),
        (["--simulate", "."], "needs either `--prompts` or `--simulate`"),
        (["--target-layer-ids", "2,4"], "the weights of"),
    ],
)
def test_settings_that_cannot_be_used_are_exit_code_2(
    evaluate: Evaluate, flags: list[str], message: str, capsys: Capture
) -> None:
    assert evaluate(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_comparison_needs_prompts(draft: Path, capsys: Capture) -> None:
    line = ["evaluate", str(draft), "--simulate", str(draft), "--against", str(draft)]

    assert run(line) == 2
    assert "`--against` needs `--prompts`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}], "has an empty `prompt`"),
        ([{"messages": []}], "has an empty conversation"),
        ([{"answer": "Two."}], "has none of the keys"),
        ([], "is empty"),
    ],
)
def test_prompts_without_text_are_exit_code_3(
    evaluate: Evaluate,
    prompts: Path,
    rows: list[dict[str, Any]],
    message: str,
    capsys: Capture,
) -> None:
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert evaluate() == 3
    assert message in capsys.readouterr().err


def test_missing_prompts_are_exit_code_2(evaluate: Evaluate, capsys: Capture) -> None:
    assert evaluate(given=Path("nowhere.jsonl")) == 2
    assert "neither an existing path nor a data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 64}, "for a verifier of hidden size 64"),
        ({"vocab_size": 2000}, "for a verifier of vocabulary 2,000"),
        ({"hidden_size": 96}, "has no embedding, and its hidden size 96"),
        ({"target_layer_ids": (2, 4, 9)}, "reads verifier layer 9"),
    ],
)
def test_a_draft_of_another_verifier_is_exit_code_4(
    evaluate: Evaluate, tmp_path: Path, changes: dict[str, Any], message: str, capsys: Capture
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "target_hidden_size": 128,
        "vocab_size": 2048,
        "target_layer_ids": (2, 4, 5),
        "verifier_name_or_path": str(VERIFIER_DIR),
    }
    other = write_draft(tmp_path / "other", make_config(**sizes | changes))

    assert evaluate(checkpoint=other) == 4
    assert message in capsys.readouterr().err
    assert evaluate("--against", other) == 4


def test_another_name_of_the_verifier_is_a_warning(
    evaluate: Evaluate, draft: Path, capsys: Capture
) -> None:
    content, tensors = read_folder(draft)
    content["speculators_config"]["verifier"]["name_or_path"] = "some/other-model"
    write_folder(draft, content, tensors)

    assert evaluate("--verifier-name-or-path", VERIFIER_DIR) == 0
    assert "was trained for verifier `some/other-model`" in capsys.readouterr().err


def test_a_verifier_without_weights_is_exit_code_2(
    evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    assert evaluate("--verifier-name-or-path", empty) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_verifier_that_does_not_fit_is_exit_code_5(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)

    assert evaluate() == 5
    err = capsys.readouterr().err
    assert "does not fit into the memory" in err
    assert "--dtype bfloat16" in err


def test_a_batch_that_does_not_fit_is_exit_code_5(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("speculators_cli.core.evaluation.evaluate.answer_alone", fail)

    assert evaluate() == 5
    assert "Lower `--batch-size`" in capsys.readouterr().err


def test_another_number_of_tokens_than_the_blocks_is_a_warning(
    evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    config = make_block_config(**FOR_EMBEDDED)
    block = write_draft(tmp_path / "block", config)

    few = evaluate("--num-speculative-tokens", 2, checkpoint=block)
    warned = capsys.readouterr().err
    usual = evaluate(checkpoint=block)

    assert (few, usual) == (0, 0)
    assert "The draft was trained to propose 4 tokens, not 2" in " ".join(warned.split())
    assert "trained to propose" not in capsys.readouterr().err
