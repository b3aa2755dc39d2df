"""Folders of which some samples are of another kind than they are marked as."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from speculators_cli.cli.app import run
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.tiny_run import HIDDEN, VOCAB, TinyInputs, write_verifier

Capture = pytest.CaptureFixture[str]
NUM_SAMPLES = 120
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tiny: TinyInputs, tmp_path: Path) -> Path:
    """Samples of which the tiny verifier's head predicts every token; one in ten is edited."""
    return write_greedy(tiny, tmp_path / "greedy")


def write_greedy(tiny: TinyInputs, data: Path) -> Path:
    data.mkdir()
    verifier = read_verifier(tiny.verifier_dir)
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM_SAMPLES):
        states = [torch.randn(20, HIDDEN, generator=generator) for _ in range(4)]
        ids = torch.randint(VOCAB, (20,), generator=generator)
        normed = verifier.normed(states[-1], torch.zeros(20, dtype=torch.bool))
        ids[1:] = verifier.tokens(normed)[:-1]
        mask = torch.arange(20) >= 3
        torch.save(
            {"input_ids": ids, "loss_mask": mask, "hidden_states": states},
            data / f"data_{index:03}.pt",
        )
    return data


def read_verifier(folder: Path) -> Any:
    files = VerifierFiles(str(folder))
    return load_frozen_verifier(files, read_verifier_config(files, trust_remote_code=False))


def edit(files: list[Path], change: Edit) -> list[str]:
    for file in files:
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)
    return [file.name for file in files]


def norm(tiny: TinyInputs) -> Edit:
    verifier = read_verifier(tiny.verifier_dir)

    def change(content: dict[str, Any]) -> None:
        last = content["hidden_states"][-1]
        content["hidden_states"][-1] = verifier.normed(last, torch.zeros(len(last)).bool())

    return change


def mark(content: dict[str, Any]) -> None:
    content["last_hidden_state_is_normed"] = torch.tensor(True)


def train(tiny: TinyInputs, folder: Path, capsys: Capture) -> tuple[int, str]:
    capsys.readouterr()
    code = run(["train", *tiny.flags(data_path=folder, max_steps=1)])
    return code, " ".join(capsys.readouterr().err.split())


def every_tenth(folder: Path, start: int = 3) -> list[Path]:
    return sorted(folder.glob("*.pt"))[start::10]


def one_block(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"))[90:102]


@pytest.mark.parametrize("choose", [every_tenth, one_block])
def test_a_tenth_that_is_normed_and_not_marked_is_found(
    tiny: TinyInputs, folder: Path, capsys: Capture, choose: Callable[[Path], list[Path]]
) -> None:
    names = edit(choose(folder), norm(tiny))

    code, err = train(tiny, folder, capsys)

    assert code == 3
    assert "samples checked in" in err
    assert "marked as before the final norm but the scale of states after it" in err
    assert any(name in err for name in names)
    assert "--no-check-samples" in err
    assert not list(tiny.save_path.glob("*/config.json"))


@pytest.mark.parametrize("family", ["starcoder2", "cohere"])
@pytest.mark.parametrize("is_marked", [False, True])
def test_a_tenth_of_another_kind_is_found_where_the_norm_subtracts_the_mean(
    tiny: TinyInputs, tmp_path: Path, capsys: Capture, family: str, is_marked: bool
) -> None:
    write_layer_norm_verifier(tiny.verifier_dir, family)
    folder = write_greedy(tiny, tmp_path / "greedy")
    names = edit(every_tenth(folder), mark if is_marked else norm(tiny))

    code, err = train(tiny, folder, capsys)

    assert code == 3
    assert f"marked as {'after' if is_marked else 'before'} the final norm" in err
    # All samples of one mark may be judged at once.
    assert is_marked or any(name in err for name in names)


@pytest.mark.parametrize("family", ["starcoder2", "cohere"])
def test_samples_marked_as_they_are_train_where_the_norm_subtracts_the_mean(
    tiny: TinyInputs, tmp_path: Path, capsys: Capture, family: str
) -> None:
    write_layer_norm_verifier(tiny.verifier_dir, family)
    folder = write_greedy(tiny, tmp_path / "greedy")
    edit(every_tenth(folder), norm(tiny))
    edit(every_tenth(folder), mark)

    code, err = train(tiny, folder, capsys)

    assert code == 0, err
    assert "final norm" not in err


def write_layer_norm_verifier(folder: Path, family: str) -> None:
    folder.unlink()  # a link to one that tests share
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 9}
    heads = {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, **heads, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        norm = model.model.norm
        norm.weight.data.uniform_(0.5, 1.5)
        if getattr(norm, "bias", None) is not None:
            norm.bias.data.normal_(0, 0.3)
        model.get_output_embeddings().weight.data.normal_()
    model.save_pretrained(folder)


def test_a_tenth_that_is_marked_and_not_normed_is_found(
    tiny: TinyInputs, folder: Path, capsys: Capture
) -> None:
    names = edit(every_tenth(folder), mark)

    code, err = train(tiny, folder, capsys)

    assert code == 3
    assert "marked as after the final norm" in err
    assert any(name in err for name in names)


def test_a_mix_that_is_marked_as_it_is_trains_without_a_warning(
    tiny: TinyInputs, folder: Path, capsys: Capture
) -> None:
    edit(every_tenth(folder), norm(tiny))
    edit(every_tenth(folder), mark)

    code, err = train(tiny, folder, capsys)

    assert code == 0
    assert "final norm" not in err
    assert "not match this verifier" not in err


def test_a_sub_folder_of_another_verifier_is_named(
    tiny: TinyInputs, folder: Path, capsys: Capture
) -> None:
    other = folder / "other"
    other.mkdir()
    for file in one_block(folder):
        file.rename(other / file.name)
    edit(
        list(other.glob("*.pt")),
        lambda content: content.update(input_ids=(content["input_ids"] + 7) % VOCAB),
    )

    code, err = train(tiny, folder, capsys)

    assert code == 0
    assert f"`{other}` does not match this verifier, or is misaligned" in err
    assert f"`{folder}` does not match this verifier" not in err


def test_an_even_norm_hides_no_wrong_mark(
    tiny: TinyInputs, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Of a gain of twos, the norm changes how sharp a distribution is, but not its first token.
    model = write_verifier(tmp_path / "even")
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    model.save_pretrained(tmp_path / "even")
    verifier = read_verifier(tmp_path / "even")
    for file in folder.glob("*.pt"):
        content = torch.load(file, weights_only=True)
        states = content["hidden_states"][-1]
        content["input_ids"][1:] = verifier.tokens(states)[:-1]
        torch.save(content, file)
    even = ["--verifier-name-or-path", str(tmp_path / "even")]
    flags = tiny.flags(data_path=folder, max_steps=1, verifier_name_or_path=None)
    assert run(["train", *flags, *even]) == 0
    edit(every_tenth(folder), mark)
    capsys.readouterr()

    code = run(["train", *flags, *even, "--no-resume-from-checkpoint"])

    assert code == 3
    assert "marked as after the final norm" in " ".join(capsys.readouterr().err.split())


def test_inspection_lists_the_samples_that_are_marked_wrongly(
    tiny: TinyInputs, folder: Path, capsys: Capture
) -> None:
    names = edit(every_tenth(folder), norm(tiny))
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--samples", str(NUM_SAMPLES)]

    code = run(["inspect-data", str(folder), *flags, "--json"])

    problems = json.loads(capsys.readouterr().out)["problems"]
    found = [Path(p["file"]).name for p in problems if "marked as before" in p["problem"]]
    assert code == 1
    assert found == names
