"""A checkpoint that is not as it was saved, or that no run can have saved, is never resumed."""

import json
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from tests.recorded_progress import RecordedProgress
from tests.tiny_run import TinyInputs


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped weights": (
        lambda folder: flip(folder / "model.safetensors"),
        r"`model\.safetensors` is corrupted \(checksum mismatch\)",
    ),
    "flipped moments": (
        lambda folder: flip(folder / "trainer/optimizer.safetensors"),
        r"`trainer/optimizer\.safetensors` is corrupted \(checksum mismatch\)",
    ),
    "flipped config": (
        lambda folder: flip(folder / "config.json"),
        r"`config\.json` is corrupted \(checksum mismatch\)",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
        r"`model\.safetensors` has 4 bytes, [\d,]+ were saved",
    ),
    "missing": (
        lambda folder: (folder / "trainer/optimizer.safetensors").unlink(),
        r"`trainer/optimizer\.safetensors` cannot be read: No such file",
    ),
    "no manifest": (
        lambda folder: (folder / "trainer/manifest.json").unlink(),
        r"`trainer/manifest\.json` does not exist",
    ),
    "torn manifest": (
        lambda folder: (folder / "trainer/manifest.json").write_text('{"schema_version": 1, "fi'),
        r"`trainer/manifest\.json` is truncated",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_latest_checkpoint_falls_back_to_the_one_before(
    trained: TinyInputs, name: str
) -> None:
    damage, reason = DAMAGE[name]
    damage(trained.save_path / "1")
    warnings = RecordedProgress()

    report = train(trained.settings(), progress=warnings)

    (text,) = [text for text in warnings.warnings if "is damaged and not resumed" in text]
    assert f"`{trained.save_path / '1'}`" in text
    assert re.search(reason, text)
    assert (report.is_resumed, report.was_already_finished) == (True, False)
    assert [c.folder.name for c in find_checkpoints(trained.save_path)] == ["0", "1"]
    assert find_checkpoints(trained.save_path)[1].find_damage() is None


def test_the_run_after_a_fallback_ends_in_the_same_bits(
    trained: TinyInputs, trained_once: Path
) -> None:
    flip(trained.save_path / "1/model.safetensors")

    train(trained.settings(), progress=SilentProgress())

    names = ("model.safetensors", "trainer/optimizer.safetensors")
    for name in names:
        expected = (trained_once / "1" / name).read_bytes()
        assert (trained.save_path / "1" / name).read_bytes() == expected


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_does_not_start_over_because_all_its_checkpoints_are_damaged(
    trained: TinyInputs, name: str
) -> None:
    damage, reason = DAMAGE[name]
    shutil.rmtree(trained.save_path / "0")
    damage(trained.save_path / "1")

    with pytest.raises(CheckpointError, match=reason) as error:
        train(trained.settings(), progress=SilentProgress())

    assert error.value.exit_code == 4
    assert "--no-resume-from-checkpoint" in str(error.value.hint)
    result = json.loads((trained.save_path / "result.json").read_text())
    assert result["exit_code"] == 4
    over = trained.settings(run={"resume_from_checkpoint": False, "max_steps": 1})
    train(over, progress=SilentProgress())
    assert find_checkpoints(trained.save_path)[-1].find_damage() is None


def test_a_damaged_new_run_does_not_fall_back_to_the_run_before(
    trained: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "speculators_cli.core.training.run_folder.RunFolder._discard", lambda *_: None
        )
        changes = {"resume_from_checkpoint": False, "epochs": 1, "max_steps": 3}
        train(trained.settings(run=changes), progress=SilentProgress())
    flip(trained.save_path / "step-3/model.safetensors")

    with pytest.raises(CheckpointError, match="step-3"):
        train(trained.settings(), progress=SilentProgress())


@pytest.mark.parametrize("name", DAMAGE)
def test_a_best_checkpoint_that_is_damaged_is_not_exported(trained: TinyInputs, name: str) -> None:
    damage, reason = DAMAGE[name]
    best = trained.save_path / "checkpoint_best"
    damage(trained.save_path / best.readlink())

    with pytest.raises(CheckpointError, match=reason):
        read_draft(str(trained.save_path), Overrides(), flag="CHECKPOINT")


def tamper(folder: Path, name: str, **changes: Any) -> None:
    """Change values of a JSON file of a checkpoint, and its record in the manifest."""
    content = json.loads((folder / name).read_text()) | changes
    data = json.dumps({key: x for key, x in content.items() if x != "left out"}).encode()
    replace_file(folder, name, data)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    manifest = folder / "trainer/manifest.json"
    if folder / name != manifest:
        content = json.loads(manifest.read_text())
        record = {"num_bytes": len(data), "sha256": sha256(data).hexdigest()}
        content["files"][name] = record
        manifest.write_text(json.dumps(content))


STATE_CHANGES: dict[str, dict[str, Any]] = {
    "step of 10^30": {"step": 10**30},
    "step of 10^18": {"step": 10**18},
    "step of 10^9": {"step": 10**9},
    "another step": {"step": 15},
    "step as a float": {"step": 16.0},
    "step as a text": {"step": "16"},
    "step as true": {"step": True},
    "negative step": {"step": -1},
    "negative epoch": {"epoch": -1},
    "a later epoch": {"epoch": 9},
    "an earlier epoch": {"epoch": 1},
    "step in the epoch": {"step_in_epoch": 7},
    "global batch of 0": {"global_batch": 0},
    "global batch of 10^9": {"global_batch": 10**9},
    "global batch of 10^5": {"global_batch": 10**5},
    "global batch as a list": {"global_batch": [1]},
    "no ranks": {"num_ranks": 0},
    "run id as a number": {"run_id": 7},
    "start as a text": {"started_at": "x"},
    "start of NaN": {"started_at": float("nan")},
    "settings as a list": {"settings": []},
    "settings as a section": {"settings": {"run": 3}},
    "best as a list": {"best": ["1"]},
    "best elsewhere": {"best": {"name": "../..", "acceptance_length": 1.0, "loss": 1.0}},
    "best without name": {"best": {"loss": 1.0}},
    "best with texts": {"best": {"name": "1", "acceptance_length": "x", "loss": 1.0}},
    "skipped as a float": {"num_skipped_steps": 0.5},
    "many skipped": {"num_skipped_steps": 5},
    "metrics as a list": {"metrics": [1.0]},
    "metrics as texts": {"metrics": {"loss": "x"}},
    "generation as a text": {"generation": "x"},
    "no step": {"step": "left out"},
    "no run id": {"run_id": "left out"},
}


@pytest.mark.parametrize("name", STATE_CHANGES)
def test_a_state_that_no_run_has_saved_is_refused(trained: TinyInputs, name: str) -> None:
    shutil.rmtree(trained.save_path / "0")
    tamper(trained.save_path / "1", "trainer/state.json", **STATE_CHANGES[name])

    with pytest.raises(CheckpointError):
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())


MANIFEST_CHANGES: dict[str, dict[str, Any]] = {
    "schema as a text": {"schema_version": "2"},
    "schema of 0": {"schema_version": 0},
    "newer schema": {"schema_version": 2},
    "files as a list": {"files": []},
    "other files": {"files": {"../x": {"num_bytes": 1, "sha256": "0" * 64}}},
    "generation as a text": {"generation": "1"},
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_manifest_that_no_run_has_saved_is_refused(trained: TinyInputs, name: str) -> None:
    shutil.rmtree(trained.save_path / "0")
    tamper(trained.save_path / "1", "trainer/manifest.json", **MANIFEST_CHANGES[name])

    with pytest.raises(CheckpointError):
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())


Tensors = dict[str, torch.Tensor]
TENSOR_CHANGES: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "weight missing": ("model.safetensors", lambda x: x.pop("fc.weight")),
    "weight of another shape": (
        "model.safetensors",
        lambda x: x.update({"fc.weight": torch.zeros(3, 4)}),
    ),
    "weight of another type": (
        "model.safetensors",
        lambda x: x.update({"fc.weight": x["fc.weight"].half()}),
    ),
    "moment missing": ("trainer/optimizer.safetensors", lambda x: x.pop("fc.weight.exp_avg")),
    "moment of another shape": (
        "trainer/optimizer.safetensors",
        lambda x: x.update({"fc.weight.exp_avg_sq": torch.zeros(1)}),
    ),
    "moment of another type": (
        "trainer/optimizer.safetensors",
        lambda x: x.update({"fc.weight.step": torch.zeros((), dtype=torch.int64)}),
    ),
    "steps of another run": (
        "trainer/optimizer.safetensors",
        lambda x: x.update({"fc.weight.step": torch.tensor(3.0)}),
    ),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_are_not_the_drafts_are_refused(trained: TinyInputs, name: str) -> None:
    file, change = TENSOR_CHANGES[name]
    folder = trained.save_path / "1"
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    replace_file(folder, file, (folder / file).read_bytes())

    with pytest.raises(CheckpointError):
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())


def test_a_file_that_holds_no_tensors_is_refused(trained: TinyInputs) -> None:
    replace_file(trained.save_path / "1", "model.safetensors", b"no tensors")

    with pytest.raises(CheckpointError):
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())


@pytest.mark.parametrize("num_layers", [20_000, 10**9])
def test_a_config_of_more_layers_than_tensors_is_refused_at_once(
    trained: TinyInputs, num_layers: int
) -> None:
    folder = trained.save_path / "1"
    layers = json.loads((folder / "config.json").read_text())["transformer_layer_config"]
    changes = {"transformer_layer_config": layers | {"num_hidden_layers": num_layers}}
    tamper(folder, "config.json", **changes)

    with pytest.raises(CheckpointError):
        read_draft(str(folder), Overrides(), flag="CHECKPOINT")


def test_a_checkpoint_of_an_earlier_version_is_resumed(
    trained: TinyInputs, trained_once: Path
) -> None:
    shutil.rmtree(trained.save_path / "1")
    new = ("generation", "content_hash", "verifier_hash", "has_same_data", "packing")
    tamper(trained.save_path / "0", "trainer/state.json", **dict.fromkeys(new, "left out"))
    tamper(trained.save_path / "0", "trainer/manifest.json", generation="left out")

    report = train(trained.settings(), progress=SilentProgress())

    assert report.is_resumed
    expected = (trained_once / "1/model.safetensors").read_bytes()
    assert (trained.save_path / "1/model.safetensors").read_bytes() == expected
