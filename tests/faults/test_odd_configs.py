"""Odd values in a verifier's config.json: read or refused by name, the same in every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.models.special_tokens import find_special_ids
from speculators_cli.core.models.verifier import read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
# The class of the config refuses each of these, and none of them is needed.
NOT_NEEDED: list[dict[str, Any]] = [
    {"head_dim": "8"},
    {"head_dim": 8.0},
    {"head_dim": 7},
    {"intermediate_size": [40] * 9},
    {"max_position_embeddings": "128"},
    {"use_cache": "yes"},
    {"initializer_range": float("nan")},
    {"layer_types": ["unknown"] * 3},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_fast": "x"}},
]


@pytest.fixture
def verifier_dir(shared_inputs: TinyInputs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_inputs.verifier_dir, tmp_path / "verifier"))


def change_config(folder: Path, changes: dict[str, Any]) -> VerifierFiles:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return VerifierFiles(str(folder))


@pytest.mark.parametrize("changes", NOT_NEEDED, ids=str)
def test_what_is_not_needed_stops_no_command(verifier_dir: Path, changes: dict[str, Any]) -> None:
    (verifier_dir / "generation_config.json").unlink()
    files = change_config(verifier_dir, {"eos_token_id": [5, 6], **changes})

    ids, _ = find_special_ids(files)
    config = read_verifier_config(files, trust_remote_code=False)

    assert ids == {5, 6}
    assert config.hidden_size == 24
    assert config.head_dim % 2 == 0


def test_an_end_token_that_is_no_id_is_refused_by_name(
    verifier_dir: Path, shared_inputs: TinyInputs, tmp_path: Path, capsys: Capture
) -> None:
    change_config(verifier_dir, {"eos_token_id": "5"})
    flags = {
        "data-path": shared_inputs.data_dir,
        "verifier-name-or-path": verifier_dir,
        "draft-vocab-size": 19,
        "output-dir": tmp_path / "maps",
    }

    code = run(["build-vocab-map", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])

    assert code == 2
    assert "`eos_token_id` in `config.json` of the verifier is `5`" in capsys.readouterr().err


def test_a_verifier_with_an_odd_head_size_gets_a_draft_with_an_even_one(
    verifier_dir: Path, shared_inputs: TinyInputs, tmp_path: Path, capsys: Capture
) -> None:
    change_config(verifier_dir, {"head_dim": 7})
    given = {"verifier_name_or_path": verifier_dir, "save_path": tmp_path / "run", "epochs": 1}

    assert run(["train", *shared_inputs.flags(**given)]) == 0

    assert "has an odd `head_dim`, 7, and the heads of the draft have 6" in capsys.readouterr().err
    saved = json.loads((tmp_path / "run" / "0" / "config.json").read_text())
    assert saved["transformer_layer_config"]["head_dim"] == 6
    assert run(["export", str(tmp_path / "run"), "--output-dir", str(tmp_path / "served")]) == 0


@pytest.mark.parametrize("theta", [50000.0, "50000"])
def test_a_rope_that_transformers_does_not_compute_does_not_stop_training(
    verifier_dir: Path, theta: object
) -> None:
    rope = {"rope_type": "quantum", "rope_theta": theta, "factor": 2.0}
    files = change_config(verifier_dir, {"rope_parameters": rope})

    config = read_verifier_config(files, trust_remote_code=False)

    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    assert config.rope_left_out == "is of type `quantum`"
    assert config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("given", "expected"),
    [("LlamaForCausalLM", ("LlamaForCausalLM",)), (None, ()), ([None, "A", 3], ("A",))],
)
def test_architectures_are_names(
    verifier_dir: Path, given: object, expected: tuple[str, ...]
) -> None:
    files = change_config(verifier_dir, {"architectures": given})

    assert read_verifier_config(files, trust_remote_code=False).architectures == expected
