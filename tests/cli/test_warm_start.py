"""`speculators train --from-checkpoint` as the user types it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators_cli.cli.app import run
from tests.run_files import read_losses
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]


def train(tiny: TinyInputs, name: str, *flags: str, **changes: object) -> int:
    given = {"verifier_name_or_path": tiny.verifier_dir.resolve(), **changes}
    return run(["train", *tiny.flags(save_path=tiny.folder / name, **given), *flags])


@pytest.fixture(scope="module")
def trained_once(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained draft of another shape than the default; nothing may be written into it."""
    own = shared_inputs.flags(save_path=tmp_path_factory.mktemp("run") / "first")
    flags = ("--num-layers", "2", "--draft-arch", "qwen3", "--no-norm-before-residual")
    assert run(["train", *own, "--norm-output", *flags]) == 0
    return Path(own[own.index("--save-path") + 1])


@pytest.fixture
def trained(trained_once: Path, tiny: TinyInputs) -> Path:
    """A copy of it beside the tiny inputs."""
    return Path(shutil.copytree(trained_once, tiny.folder / "first", symlinks=True))


@pytest.mark.parametrize("kind", ["save path", "epoch", "export"])
def test_a_run_begins_with_the_draft_it_is_given(
    tiny: TinyInputs, trained: Path, kind: str
) -> None:
    source = {"save path": trained, "epoch": trained / "1", "export": tiny.folder / "served"}[kind]
    export = ["export", str(trained / "1"), "--output-dir", str(tiny.folder / "served")]
    assert run([*export, "--dtype", "float32"]) == 0

    # No step moves a weight this slowly.
    code = train(
        *(tiny, "second", "--from-checkpoint", str(source)), lr=1e-30, epochs=1, noise_std=0
    )

    best = (trained / "checkpoint_best").resolve()
    before = load_file((best if kind == "save path" else trained / "1") / "model.safetensors")
    after = load_file(tiny.folder / "second/0/model.safetensors")
    config = json.loads((tiny.folder / "second/0/config.json").read_text())
    settings = json.loads((tiny.folder / "second/settings.json").read_text())
    assert code == 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config == json.loads((trained / "1/config.json").read_text())
    assert settings["draft"]["num_layers"] == 2
    assert settings["eagle3"]["norm_before_residual"] is False


def test_the_first_loss_is_that_of_the_trained_draft(tiny: TinyInputs, trained: Path) -> None:
    train(tiny, "on", "--from-checkpoint", str(trained), epochs=1)

    assert read_losses(tiny.folder / "on")[0] < 0.9 * read_losses(trained)[0]


def test_the_maps_are_not_needed(tiny: TinyInputs, trained: Path) -> None:
    flags = ("--from-checkpoint", str(trained))

    assert train(tiny, "second", *flags, d2t_path=None, t2d_path=None, max_steps=1) == 0


def with_embedding(trained: Path, folder: Path, change: Callable[[Tensor], Tensor]) -> Path:
    folder.mkdir()
    tensors = load_file(trained / "1/model.safetensors")
    tensors["embed_tokens.weight"] = change(tensors["embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((trained / "1/config.json").read_text())
    return folder


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--plan",)])
def test_a_draft_with_an_embedding_of_its_own_is_refused(
    tiny: TinyInputs, trained: Path, capsys: Capture, flags: tuple[str, ...]
) -> None:
    other = with_embedding(trained, tiny.folder / "other", lambda x: x.flip(0))

    assert train(tiny, "second", "--from-checkpoint", str(other), *flags) == 2

    assert "has its own embedding, which differs from that of" in capsys.readouterr().err
    assert not (tiny.folder / "second").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_that_was_only_rounded_is_the_verifiers(
    tiny: TinyInputs, trained: Path, dtype: torch.dtype
) -> None:
    rounded = with_embedding(trained, tiny.folder / "rounded", lambda x: x.to(dtype))

    code = train(tiny, "second", "--from-checkpoint", str(rounded), max_steps=1)

    before = load_file(trained / "1/model.safetensors")["embed_tokens.weight"]
    after = load_file(tiny.folder / "second/step-1/model.safetensors")["embed_tokens.weight"]
    assert code == 0
    assert torch.equal(before, after)


def test_maps_that_only_lie_in_the_working_folder_are_not_compared(
    tiny: TinyInputs, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    elsewhere = tiny.folder / "elsewhere"
    elsewhere.mkdir()
    t2d = np.arange(37) % 2 == 1
    np.save(elsewhere / "d2t.npy", np.flatnonzero(t2d) - np.arange(t2d.sum()))
    np.save(elsewhere / "t2d.npy", t2d)
    monkeypatch.chdir(elsewhere)
    flags = ("--from-checkpoint", str(trained))

    assert train(tiny, "second", *flags, d2t_path=None, t2d_path=None, max_steps=1) == 0


def test_the_run_can_be_resumed_and_repeated(tiny: TinyInputs, trained: Path) -> None:
    flags = ("--from-checkpoint", str(trained))
    assert train(tiny, "second", *flags, epochs=1) == 0

    assert train(tiny, "second", *flags, epochs=2) == 0

    again = ["train", "--config", str(tiny.folder / "second/settings.json")]
    assert run([*again, "--save-path", str(tiny.folder / "third")]) == 0
    assert (tiny.folder / "second/1/config.json").exists()
    assert len(read_losses(tiny.folder / "third")) > 4


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--num-layers", "3"], 2, "`--num-layers` is `3`, but the draft in `first/"),
        (["--norm-before-residual"], 2, "`--norm-before-residual` is `True`"),
        (["--full-vocab"], 2, "`--full-vocab` is `True`"),
        (["--block-size", "4"], 2, "is a setting of `dflash` or `dspark`, not of `eagle3`"),
        (["--from-checkpoint", "./nowhere"], 2, "`--from-checkpoint`: the folder `./nowhere`"),
        (["--from-checkpoint", "verifier"], 4, "is no draft"),
        (["--d2t-path", "other-d2t.npy", "--t2d-path", "other-t2d.npy"], 2, "is not the draft voc"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_what_contradicts_the_draft_is_refused(
    tiny: TinyInputs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    import numpy as np

    monkeypatch.chdir(tiny.folder)
    t2d = np.arange(37) % 2 == 1
    np.save("other-d2t.npy", np.flatnonzero(t2d) - np.arange(t2d.sum()))
    np.save("other-t2d.npy", t2d)
    source = [] if "--from-checkpoint" in flags else ["--from-checkpoint", "first"]

    assert train(tiny, "second", *source, *flags) == code

    assert message in capsys.readouterr().err
    assert not (tiny.folder / "second").exists()


@pytest.fixture(scope="module")
def windowed_once(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained draft with a window in one of two layers; nothing may be written into it."""
    save_path = tmp_path_factory.mktemp("run") / "windowed"
    own = shared_inputs.flags(save_path=save_path, max_steps=1, num_layers=2)
    assert run(["train", *own, "--sliding-window", "9", "--full-attention-layers", "0"]) == 0
    return save_path


KEPT = {"sliding_window": 9, "full_attention_layers": [0]}


@pytest.mark.parametrize(
    ("flags", "expected", "warned"),
    [
        ([], KEPT, []),
        (["--sliding-window", "9"], KEPT, []),
        (
            ["--sliding-window", "12"],
            KEPT | {"sliding_window": 12},
            ["`--sliding-window` `9`; it is trained further with `12`"],
        ),
        (
            ["--full-attention-layers", "1"],
            KEPT | {"full_attention_layers": [1]},
            ["`--full-attention-layers` `0`; it is trained further with `1`"],
        ),
        (
            ["--sliding-window", "0"],
            {"sliding_window": None, "full_attention_layers": None},
            ["`--sliding-window` `9`; it is trained further with `none`"],
        ),
    ],
)
def test_the_windows_of_the_draft_are_kept_unless_given(
    tiny: TinyInputs,
    windowed_once: Path,
    capsys: Capture,
    flags: list[str],
    expected: dict[str, object],
    warned: list[str],
) -> None:
    source = ("--from-checkpoint", str(windowed_once))

    assert train(tiny, "second", *source, *flags, max_steps=1) == 0

    err = " ".join(capsys.readouterr().err.split())
    settings = json.loads((tiny.folder / "second/settings.json").read_text())["eagle3"]
    config = json.loads((tiny.folder / "second/step-1/config.json").read_text())
    layers = config["transformer_layer_config"]
    assert {name: settings[name] for name in KEPT} == expected
    assert layers.get("sliding_window") == expected["sliding_window"]
    kinds = layers.get("layer_types", ["full_attention"] * 2)
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    assert full == (expected["full_attention_layers"] or [0, 1])
    assert err.count("it is trained further with") == len(warned)
    assert all(text in err for text in warned)
    # As it was saved, it is resumed without another warning.
    assert train(tiny, "second", *source, *flags, max_steps=2) == 0


def test_samples_of_other_layers_are_refused(
    tiny: TinyInputs, trained: Path, capsys: Capture
) -> None:
    served = tiny.folder / "moved"
    served.mkdir()
    content = json.loads((trained / "1/config.json").read_text())
    content["eagle_aux_hidden_state_layer_ids"] = [2, 4, 6]
    del content["layer_ids_assumed"]
    (served / "config.json").write_text(json.dumps(content))
    save_file(load_file(trained / "1/model.safetensors"), served / "model.safetensors")
    data_config = tiny.folder / "said"
    data_config.mkdir()
    for file in tiny.data_dir.glob("*.pt"):
        (data_config / file.name).symlink_to(file)
    (data_config / "data_config.json").write_text(
        json.dumps({"hidden_states": {"layer_ids": [3, 5, 7], "layer_ids_convention": "vllm"}})
    )
    flags = ("--from-checkpoint", str(served))

    assert train(tiny, "second", *flags, data_path=data_config) == 3

    assert "have the verifier layers [3, 5, 7], the draft in" in capsys.readouterr().err
    assert train(tiny, "third", *flags, max_steps=1) == 0
    config = json.loads((tiny.folder / "third/step-1/config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
