"""A guess of the layers that samples hold stays marked as one until it is confirmed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.cli.app import run
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
CONFIRMED = "3,5,7"
# What is assumed of a draft without ids, for the tiny verifier's nine layers: not the samples' ids.
OF_THE_ENGINE = "2,4,6"


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def train(tiny: TinyInputs, capsys: Capture, *more: str, **flags: object) -> tuple[str, str]:
    capsys.readouterr()
    assert run(["train", *tiny.flags(**{"epochs": 1} | flags), *more]) == 0
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


def export(folder: Path, served: Path, capsys: Capture, *more: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    code = run(["export", str(folder), "--output-dir", str(served), "--json", *more])
    captured = capsys.readouterr()
    assert code == 0
    return json.loads(captured.out), " ".join(captured.err.split())


@pytest.fixture
def without_ids(tiny: TinyInputs, capsys: Capture) -> Path:
    """A draft as early versions of upstream wrote it: its config names no verifier layers."""
    train(tiny, capsys)
    folder = tiny.folder / "without-ids"
    folder.mkdir()
    content = read(tiny.save_path / "0/config.json")
    del content["eagle_aux_hidden_state_layer_ids"]
    del content["producer"]
    content.pop("layer_ids_assumed", None)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(load_file(tiny.save_path / "0/model.safetensors"), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("target", ["vllm", "eagle"])
def test_a_guess_is_marked_from_the_samples_to_the_served_folder(
    tiny: TinyInputs, capsys: Capture, target: str
) -> None:
    out, err = train(tiny, capsys, "--json", "--no-norm-before-residual")
    report, export_err = export(
        tiny.save_path / "0", tiny.folder / "served", capsys, "--target", target
    )

    config, served = (
        read(tiny.save_path / "0/config.json"),
        read(tiny.folder / "served/config.json"),
    )
    assert f"assumed `{CONFIRMED}`" in err
    assert f"Pass `--target-layer-ids {CONFIRMED}` to confirm" in err
    assert json.loads(out)["are_layer_ids_assumed"] is True
    assert json.loads(out)["target_layer_ids"] == [3, 5, 7]
    assert config["layer_ids_assumed"] is True
    assert config["eagle_aux_hidden_state_layer_ids"] == [3, 5, 7]
    assert f"assumed `{CONFIRMED}`" in export_err
    assert report["are_layer_ids_assumed"] is True
    assert served["layer_ids_assumed"] is True
    assert served["eagle_aux_hidden_state_layer_ids"] == [3, 5, 7]
    assert "3, 5, 7 (assumed)" in (tiny.folder / "served/README.md").read_text()
    assert read(tiny.folder / "served/provenance.json")["export"]["are_layer_ids_assumed"] is True


@pytest.mark.parametrize("is_confirmed_late", [False, True])
def test_a_confirmed_guess_is_marked_no_more(
    tiny: TinyInputs, capsys: Capture, is_confirmed_late: bool
) -> None:
    early, late = ((), ("--target-layer-ids", CONFIRMED))[:: 1 if is_confirmed_late else -1]
    train(tiny, capsys, *early)
    report, err = export(tiny.save_path / "0", tiny.folder / "served", capsys, *late)

    served = read(tiny.folder / "served/config.json")
    assert "assumed" not in err
    assert report["are_layer_ids_assumed"] is False
    assert "layer_ids_assumed" not in served
    assert "assumed" not in (tiny.folder / "served/README.md").read_text()


def test_a_run_is_resumed_with_its_guess_confirmed(tiny: TinyInputs, capsys: Capture) -> None:
    train(tiny, capsys)

    _, err = train(tiny, capsys, "--target-layer-ids", CONFIRMED, epochs=2)

    assert "Resuming" in err
    assert "assumed" not in err
    assert "layer_ids_assumed" not in read(tiny.save_path / "1/config.json")


def test_a_run_is_not_resumed_with_other_layers_than_it_guessed(
    tiny: TinyInputs, capsys: Capture
) -> None:
    train(tiny, capsys)

    code = run(["train", *tiny.flags(epochs=2), "--target-layer-ids", "2,4,6"])

    assert code == 4
    err = " ".join(capsys.readouterr().err.split())
    assert "was trained on the verifier layers [3, 5, 7], but this run uses [2, 4, 6]" in err


def test_a_plan_warns_of_a_guess(tiny: TinyInputs, capsys: Capture) -> None:
    out, err = train(tiny, capsys, "--plan", "--json")

    assert f"assumed `{CONFIRMED}`" in err
    assert json.loads(out)["plan"]["are_layer_ids_assumed"] is True


def test_a_draft_without_ids_is_exported_with_a_warning(
    tiny: TinyInputs, without_ids: Path, capsys: Capture
) -> None:
    report, err = export(without_ids, tiny.folder / "served", capsys)

    assert f"has no known verifier layer ids: assumed `{OF_THE_ENGINE}`" in err
    assert report["are_layer_ids_assumed"] is True
    assert read(tiny.folder / "served/config.json")["layer_ids_assumed"] is True


@pytest.mark.parametrize(
    ("known", "expected", "is_assumed"),
    [
        ([], [3, 5, 7], True),  # the guess of a run from scratch
        (["draft"], [2, 4, 6], True),  # that the samples hold the draft's layers
        (["samples"], [2, 5, 8], False),
        (["flag"], [1, 2, 3], False),
    ],
)
def test_a_draft_trained_further_has_the_layers_of_who_knows_them(
    tiny: TinyInputs,
    without_ids: Path,
    data_dir: Path,
    capsys: Capture,
    known: list[str],
    expected: list[int],
    is_assumed: bool,
) -> None:
    if "draft" in known:
        content = read(without_ids / "config.json")
        content["eagle_aux_hidden_state_layer_ids"] = [2, 4, 6]
        (without_ids / "config.json").write_text(json.dumps(content))
    if "samples" in known:
        said = {"layer_ids": [2, 5, 8], "layer_ids_convention": "vllm"}
        (data_dir / "data_config.json").write_text(json.dumps({"hidden_states": said}))
    flag = ("--target-layer-ids", "1,2,3") if "flag" in known else ()

    _, err = train(
        *(tiny, capsys, "--from-checkpoint", str(without_ids), *flag),
        data_path=data_dir,
        save_path=tiny.folder / "further",
    )

    config = read(tiny.folder / "further/0/config.json")
    assert config["eagle_aux_hidden_state_layer_ids"] == expected
    assert config.get("layer_ids_assumed", False) is is_assumed
    assert ("no known verifier layer ids: assumed" in err) is is_assumed
    is_draft_asked = known in ([], ["samples"])
    assert ("were assumed; it is trained on the samples'" in err) is is_draft_asked


def test_a_conversion_warns_of_a_guess_and_a_run_on_it_does_too(
    tiny: TinyInputs, capsys: Capture
) -> None:
    v0, out_dir = tiny.folder / "v0", tiny.folder / "v1"
    v0.mkdir()
    for file in tiny.data_dir.glob("*.pt"):
        sample = torch.load(file, weights_only=True)
        *aux, last = sample.pop("hidden_states")
        torch.save(sample | {"hidden_state": torch.cat(aux, -1), "target": last}, v0 / file.name)
    verifier = ("--verifier-name-or-path", str(tiny.verifier_dir))

    assert run(["convert-v0", str(v0), "--output-dir", str(out_dir), *verifier]) == 0
    convert_err = " ".join(capsys.readouterr().err.split())
    assert run(["inspect-data", str(out_dir), "--json"]) == 0
    inspected = capsys.readouterr()
    _, err = train(tiny, capsys, "--no-check-samples", data_path=out_dir)

    assert f"assumed `{CONFIRMED}`" in convert_err
    assert "--target-layer-ids" in convert_err
    assert json.loads(inspected.out)["are_layer_ids_assumed"] is True
    assert "The layer ids `3,5,7` in" in " ".join(inspected.err.split())
    assert f"assumed `{CONFIRMED}`" in err
    assert read(tiny.save_path / "0/config.json")["layer_ids_assumed"] is True


def test_no_layers_are_guessed_from_ids_whose_counting_is_unknown(
    tiny: TinyInputs, capsys: Capture
) -> None:
    v0, out_dir = tiny.folder / "v0", tiny.folder / "v1"
    v0.mkdir()
    sample = torch.load(tiny.data_dir / "data_0.pt", weights_only=True)
    *aux, last = sample.pop("hidden_states")
    torch.save(sample | {"hidden_state": torch.cat(aux, -1), "target": last}, v0 / "data_0.pt")
    (v0 / "data_config.json").write_text(
        '{"version": "1.0", "hidden_states": {"layer_ids": [1, 4, 6]}}'
    )

    assert run(["convert-v0", str(v0), "--output-dir", str(out_dir), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["layer_ids"] is None
    assert read(out_dir / "data_config.json")["hidden_states"]["layer_ids"] is None


@pytest.mark.parametrize(
    ("given", "is_warned"), [("2,5,8", False), (CONFIRMED, True), (None, False)], ids=str
)
def test_layers_that_contradict_the_data_are_warned_of(
    tiny: TinyInputs, data_dir: Path, capsys: Capture, given: str | None, is_warned: bool
) -> None:
    said = {"layer_ids": [2, 5, 8], "layer_ids_convention": "vllm"}
    (data_dir / "data_config.json").write_text(json.dumps({"hidden_states": said}))
    flag = ("--target-layer-ids", given) if given else ()

    _, err = train(tiny, capsys, "--dry-run", *flag, data_path=data_dir)

    message = "has the verifier layers `2,5,8`: `--target-layer-ids` `3,5,7` is used"
    assert (message in err) is is_warned
