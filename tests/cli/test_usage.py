"""Command lines that cannot be parsed."""

import json

import pytest

from speculators_cli.cli.app import run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("trian", "`trian` is not a command", "Did you mean `train`?"),
        ("--verison", "`--verison` is not a flag of `speculators`", "Did you mean `--version`?"),
        (
            "--json train",
            "`--json` is not a flag of `speculators`",
            "Pass `--json` after the name of the command",
        ),
        (
            "export run --traget vllm",
            "`--traget` is not a flag of `speculators export`",
            "Did you mean `--target`? Run `speculators export --help` for the list",
        ),
        (
            "train --total_seq_len 8 --lrr=7",
            "`--lrr` is not a flag of `speculators train`",
            "Did you mean `--total-seq-len`, `--lr`?",
        ),
        ("train --lr", "`--lr` needs a value, `<float>`", "speculators train --help"),
        ("train --lr --epochs 3", "`--lr` needs a value, `<float>`", "speculators train --help"),
        ("train --full-vocab true", "`--full-vocab` takes no value, got `true`", "train --help"),
        ("train --dry-run=3", "`--dry-run` takes no value, got `3`", "train --help"),
        ("inspect-data a b", "Unexpected argument `b` of `speculators inspect-data`", "--help"),
        (
            "train --nproc-per-node 0",
            "`--nproc-per-node` must be a whole number of at least 1, got `0`",
            "Pass `--nproc-per-node 1` or more",
        ),
        ("train --nproc-per-node two", "at least 1, got `two`", "Pass `--nproc-per-node 1`"),
        ("env --config x", "`--config` is not a flag of `speculators env`", "env --help"),
        ("train -qx", "`-qx` is not a flag of `speculators train`", "train --help"),
        ("export", "`CHECKPOINT` is required", "Run `speculators export --help`"),
        (
            "export run --output-dir out --target eagel",
            "`--target` must be `vllm`, `sglang` or `eagle`, got `eagel`",
            "Did you mean `--target eagle`?",
        ),
        (
            "train --verifier-name-or-path x --data-path / --full-vocab --logger wandb,trakio",
            "`--logger` must be `trackio`, `wandb` or `tensorboard`, got `trakio`",
            "Did you mean `--logger trackio`?",
        ),
        (
            "bench --draft-arch qwen",
            "`--draft-arch` must be `llama` or `qwen3`, got `qwen`",
            "Did you mean `--draft-arch qwen3`?",
        ),
        (
            "bench --data-format-version 7",
            "`--data-format-version` must be `0` or `1`, got `7`",
            "Run `speculators bench --help`",
        ),
    ],
)
def test_a_wrong_command_line_is_an_error_with_what_was_meant(
    line: str, error: str, hint: str, capsys: Capture
) -> None:
    code = run(line.split())

    out, err = capsys.readouterr()
    message, shown_hint = err.split("\nhint: ")
    assert (code, out) == (2, "")
    assert message.startswith("error: ")
    assert error in message
    assert hint in shown_hint


def test_with_json_the_error_is_the_last_line(capsys: Capture) -> None:
    code = run(["export", "--json", "--traget", "vllm"])

    found = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert code == found["exit_code"] == 2
    assert found["error"] == "`--traget` is not a flag of `speculators export`"


def test_the_value_of_an_unknown_flag_is_no_error_of_its_own(capsys: Capture) -> None:
    run(["train", "--lrr", "7"])

    assert "`7`" not in capsys.readouterr().err
