"""The estimate over samples is the one that training validates with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.errors import DataError
from speculators_cli.core.evaluation.simulation import simulate
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.settings.evaluate import EvaluateSettings
from tests.tiny_run import TinyInputs, split_samples

QUIET = SilentProgress()


def make_settings(
    tiny: TinyInputs, data_dir: Path, num_tokens: int | None = None
) -> EvaluateSettings:
    content: dict[str, Any] = {
        "source": {"checkpoint": str(tiny.save_path)},
        "simulation": {"simulate": data_dir, "total_seq_len": 64},
        "engine": {"device": "cpu"},
        "drafting": {"num_speculative_tokens": num_tokens},
    }
    return EvaluateSettings.model_validate(content)


@pytest.fixture
def held_out(tiny: TinyInputs, data_dir: Path) -> Path:
    """Samples that a run validates with; the run is in the save path."""
    folder = split_samples(data_dir, tiny.folder / "held-out", num_samples=6)
    data = {"data_path": (data_dir,), "val_data_path": (folder,)}
    train(tiny.settings(data=data, run={"epochs": 1}), progress=QUIET)
    return folder


def test_the_estimate_is_that_of_validation(tiny: TinyInputs, held_out: Path) -> None:
    found = simulate(make_settings(tiny, held_out), progress=QUIET)

    result = json.loads((tiny.save_path / "result.json").read_text())
    assert found.acceptance_length == pytest.approx(result["acceptance_length"], rel=1e-6)
    assert found.acceptance_length > 1.0
    assert len(found.acceptance_rates) == 3
    assert found.num_samples == 6


def test_fewer_draft_tokens_have_the_same_first_rates(tiny: TinyInputs, held_out: Path) -> None:
    three = simulate(make_settings(tiny, held_out), progress=QUIET)
    two = simulate(make_settings(tiny, held_out, 2), progress=QUIET)
    five = simulate(make_settings(tiny, held_out, 5), progress=QUIET)

    assert two.acceptance_rates == three.acceptance_rates[:2]
    assert five.acceptance_rates[:3] == three.acceptance_rates
    assert len(five.acceptance_rates) == 5


def test_samples_of_other_layers_are_refused(tiny: TinyInputs, held_out: Path) -> None:
    config = {"hidden_states": {"layer_ids": [1, 5, 7], "layer_ids_convention": "vllm"}}
    (held_out / "data_config.json").write_text(json.dumps(config))

    with pytest.raises(DataError, match=r"layers \[1, 5, 7\]"):
        simulate(make_settings(tiny, held_out), progress=QUIET)


def test_samples_of_another_verifier_are_refused(tiny: TinyInputs, held_out: Path) -> None:
    for file in held_out.glob("*.pt"):
        sample = torch.load(file, weights_only=True)
        sample["hidden_states"] = [x[:, :20].clone() for x in sample["hidden_states"]]
        torch.save(sample, file)
    with pytest.raises(DataError, match="hidden size 20"):
        simulate(make_settings(tiny, held_out), progress=QUIET)
