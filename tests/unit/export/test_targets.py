"""Targets: what each asks of an algorithm."""

from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.targets import TARGETS
from tests.tiny_drafts import make_config, write_draft

EAGLE3 = ALGORITHMS["eagle3"]


def test_an_algorithm_without_a_format_for_a_target_is_refused_with_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = {name: EAGLE3.export_formats[name] for name in ("vllm", "eagle")}
    monkeypatch.setattr(EAGLE3, "export_formats", formats)
    draft = write_draft(tmp_path / "draft", make_config(norm_before_residual=False))

    code = run(["export", str(draft), "--output-dir", str(tmp_path / "out"), "--target", "sglang"])

    err = capsys.readouterr().err
    assert code == 4
    assert "Drafts of algorithm `eagle3` cannot be exported for SGLang" in err
    assert "`--target vllm` or `--target eagle`" in err
    assert not (tmp_path / "out").exists()
    assert find_problems(draft, "vllm") == []
    assert find_problems(draft, "sglang") == [
        "Drafts of algorithm `eagle3` cannot be exported for SGLang"
    ]


def test_the_hint_of_an_obstacle_is_a_target_that_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"norm_before_fc": True, "fc_norm": True}
    hints = []
    for name, switches in (("one", {"norm_before_fc": True}), ("both", both)):
        draft = write_draft(tmp_path / name, make_config(norm_before_residual=False, **switches))
        out = str(tmp_path / "out")

        code = run(["export", str(draft), "--output-dir", out, "--target", "sglang"])

        err = capsys.readouterr().err
        assert (code, "its `norm_before_fc` is on" in err) == (4, True)
        hints.append("`--target vllm`" in err)
    assert hints == [True, False]


@pytest.mark.parametrize("target", ["sglang", "eagle"])
def test_a_window_is_refused_where_config_json_cannot_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    config = make_config(norm_before_residual=False, sliding_window=5)
    draft = write_draft(tmp_path / "draft", config)

    code = run(["export", str(draft), "--output-dir", str(tmp_path / "out"), "--target", target])

    err = capsys.readouterr().err
    assert code == 4
    assert "its layers have a sliding window of 5 tokens" in err
    assert "`--target vllm`" in err


def test_windows_of_two_kinds_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(num_layers=2, sliding_window=5, full_attention_layers=(1,))
    draft = write_draft(tmp_path / "draft", config)

    code = run(["export", str(draft), "--output-dir", str(tmp_path / "out")])

    assert code == 4
    assert "some of its layers have a sliding window" in capsys.readouterr().err
    assert find_problems(draft, "vllm") == ["`layer_types` has layers of both types"]


def test_every_format_is_of_a_target() -> None:
    assert len(TARGETS) > 2
    for algorithm in ALGORITHMS.values():
        assert algorithm.export_formats.keys() <= TARGETS.keys()
