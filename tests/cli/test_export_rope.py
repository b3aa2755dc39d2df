"""RoPE of a draft on its way from a config.json into an export."""

import json
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.cli.app import run
from tests.tiny_drafts import make_config, write_draft

Capture = pytest.CaptureFixture[str]
LENGTH = {"original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 50000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    **LENGTH,
}


def export(draft: Path, out: Path, *flags: str) -> int:
    return run(["export", str(draft), "--output-dir", str(out), *flags])


def read_rope(out: Path) -> dict[str, Any]:
    content = json.loads((out / "config.json").read_text())
    layers = content.get("transformer_layer_config", content)
    rope: dict[str, Any] = layers["rope_parameters"]
    return rope


def test_how_to_serve_longrope_is_said_where_it_is_served(tmp_path: Path, capsys: Capture) -> None:
    # Trap: trained by the long factors, and served by the short ones, which vLLM takes by default.
    draft = write_draft(tmp_path / "draft", make_config(rope_parameters=LONGROPE))

    code = export(draft, tmp_path / "out", "--json")

    captured = capsys.readouterr()
    card = (tmp_path / "out/README.md").read_text()
    warning = "`--max-model-len` above 64"
    assert code == 0
    assert read_rope(tmp_path / "out") == LONGROPE
    assert warning in captured.err
    assert warning in card
    command = json.loads(captured.out)["serve_command"]
    assert command.endswith(" --max-model-len 128")
    assert command in card


@pytest.mark.parametrize(
    "rope",
    [
        LONGROPE | {"short_factor": LONGROPE["long_factor"]},
        LONGROPE | {"original_max_position_embeddings": 512},
    ],
)
def test_longrope_of_one_table_needs_no_length(
    tmp_path: Path, capsys: Capture, rope: dict[str, Any]
) -> None:
    draft = write_draft(tmp_path / "draft", make_config(rope_parameters=rope))

    assert export(draft, tmp_path / "out") == 0

    assert "--max-model-len" not in capsys.readouterr().err
    assert "--max-model-len" not in (tmp_path / "out/README.md").read_text()


def test_sglang_is_served_the_long_factors_at_every_length(tmp_path: Path) -> None:
    config = make_config(rope_parameters=LONGROPE, norm_before_residual=False)
    draft = write_draft(tmp_path / "draft", config)

    assert export(draft, tmp_path / "out", "--target", "sglang") == 0

    rope = read_rope(tmp_path / "out")
    assert rope["short_factor"] == rope["long_factor"] == LONGROPE["long_factor"]


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary"),
        ({"rope_type": "default", "mrope_section": [2, 1, 1]}, "`mrope_section`"),
        ({"rope_type": "linear", "factor": "a lot"}, "`factor` `a lot`"),
        ({"rope_type": "longrope", **LONGROPE, "long_factor": [2.0, 3.0]}, "`long_factor`"),
        ({"rope_type": "ntk", "factor": 2.0}, "`ntk`"),
        ({"full_attention": {"rope_type": "default"}}, "`full_attention`"),
    ],
    ids=str,
)
def test_a_rope_that_would_be_served_otherwise_than_computed_is_refused(
    tmp_path: Path, capsys: Capture, rope: dict[str, Any], reason: str
) -> None:
    draft = write_draft(tmp_path / "draft", make_config(), rope_parameters=rope)

    assert export(draft, tmp_path / "out") == 4

    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_own", [False, True])
def test_the_alpha_of_a_draft_is_exported_as_the_theta_it_was_trained_with(
    tmp_path: Path, is_own: bool
) -> None:
    # Trap: earlier versions wrote the key, trained without it, and engines apply it.
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    draft = write_draft(tmp_path / "draft", make_config(), rope_parameters=rope)
    if not is_own:
        content = json.loads((draft / "config.json").read_text())
        content["producer"]["name"] = "another"
        (draft / "config.json").write_text(json.dumps(content))

    assert export(draft, tmp_path / "out") == 0

    plain = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}
    applied = {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 1000.0 ** (8 / 6))}
    assert read_rope(tmp_path / "out") == (plain if is_own else applied)
