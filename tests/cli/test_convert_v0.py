"""`speculators convert-v0` as the user types it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators_cli.cli.app import run
from speculators_cli.core.data.formats import v1
from speculators_cli.core.models import verifier
from tests.cli.golden import assert_golden
from tests.run_files import read_losses
from tests.tiny_run import HIDDEN, TinyInputs

Capture = pytest.CaptureFixture[str]


def convert(*flags: object) -> int:
    return run(["convert-v0", *map(str, flags)])


def load(file: Path) -> dict[str, Any]:
    """By torch's own reader."""
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def final_norm(states: Tensor, gain: Tensor) -> Tensor:
    return states * (states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


@pytest.fixture
def v0_dir(tiny: TinyInputs) -> Path:
    """The tiny samples in format v0, some of them in a folder below, one as `.ckpt`."""
    folder = tiny.folder / "v0"
    (folder / "deeper").mkdir(parents=True)
    gain = load_file(tiny.verifier_dir / "model.safetensors")["model.norm.weight"]
    for index, file in enumerate(sorted(tiny.data_dir.glob("*.pt"))):
        sample = load(file)
        *aux, last = sample["hidden_states"]
        v0 = {
            "input_ids": sample["input_ids"],
            "loss_mask": sample["loss_mask"],
            "hidden_state": torch.cat(aux, dim=-1),
            "target": final_norm(last, gain),
        }
        name = file.name if index else "data_0.ckpt"
        torch.save(v0, folder / ("deeper" if index % 2 else "") / name)
    return folder


def test_the_tree_and_every_value_are_kept(tiny: TinyInputs, v0_dir: Path, capsys: Capture) -> None:
    out_dir = tiny.folder / "v1"
    before = {file: file.read_bytes() for file in v0_dir.rglob("*.*")}

    code = convert(v0_dir, "--output-dir", out_dir, "--json")

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["num_converted"], report["num_files"], report["problems"]) == (24, 24, [])
    assert report["last_hidden_states_are_normed"] is True
    assert_golden(report, "convert-v0", tiny.folder)
    sources = [file for file in before if file.is_file()]
    assert len(sources) == 24
    for source in sources:
        old, new = load(source), load((out_dir / source.relative_to(v0_dir)).with_suffix(".pt"))
        *aux, last = new["hidden_states"]
        assert torch.equal(torch.cat(aux, dim=-1), old["hidden_state"])
        assert torch.equal(last, old["target"])
        assert torch.equal(new["input_ids"], old["input_ids"])
        assert torch.equal(new["loss_mask"].long(), old["loss_mask"])
        assert bool(new["last_hidden_state_is_normed"])
        assert source.read_bytes() == before[source]
    sizes = [sum(f.stat().st_size for f in d.rglob("*") if f.is_file()) for d in (v0_dir, out_dir)]
    # No tensor is written twice, although the aux layers share their memory.
    assert sizes[1] < 1.2 * sizes[0]


def test_training_on_either_gives_the_same_losses(tiny: TinyInputs, v0_dir: Path) -> None:
    out_dir, one, two = tiny.folder / "v1", tiny.folder / "one", tiny.folder / "two"
    # The one file that changes its name would change its place in the order.
    (v0_dir / "data_0.ckpt").rename(v0_dir / "data_0.pt")
    convert(v0_dir, "--output-dir", out_dir)

    run(["train", *tiny.flags(data_path=v0_dir, data_format_version=0, save_path=one)])
    run(["train", *tiny.flags(data_path=out_dir, save_path=two)])

    assert read_losses(one) == read_losses(two)
    assert len(read_losses(one)) > 4


def test_layers_of_different_types_are_trained_on_and_converted_as_they_are(
    tiny: TinyInputs, v0_dir: Path
) -> None:
    # Trap: casting the last hidden states to the type of the aux ones loses bits.
    (v0_dir / "data_0.ckpt").rename(v0_dir / "data_0.pt")
    same_dir, out_dir = tiny.folder / "same", tiny.folder / "v1"
    for file in v0_dir.rglob("*.pt"):
        sample = load(file)
        mixed = sample | {"hidden_state": sample["hidden_state"].bfloat16()}
        torch.save(mixed, file)
        same = same_dir / file.relative_to(v0_dir)
        same.parent.mkdir(parents=True, exist_ok=True)
        torch.save(sample | {"hidden_state": mixed["hidden_state"].float()}, same)

    assert convert(v0_dir, "--output-dir", out_dir) == 0
    assert convert(v0_dir, "--output-dir", tiny.folder / "half", "--dtype", "float16") == 0
    folders = {v0_dir: 0, same_dir: 0, out_dir: 1}
    for folder, version in folders.items():
        save_path = tiny.folder / "runs" / folder.name
        flags = tiny.flags(data_path=folder, data_format_version=version, save_path=save_path)
        assert run(["train", *flags]) == 0

    first, *others = (read_losses(tiny.folder / "runs" / folder.name) for folder in folders)
    assert others == [first, first]
    for kind in ("v1", "half"):
        for file in v0_dir.rglob("*.pt"):
            before, after = load(file), load(tiny.folder / kind / file.relative_to(v0_dir))
            types = {
                "v1": ([torch.bfloat16] * 3, torch.float32),
                "half": ([torch.half] * 3, torch.half),
            }
            *aux, last = after["hidden_states"]
            assert ([x.dtype for x in aux], last.dtype) == types[kind]
            assert torch.equal(torch.cat(aux, -1), before["hidden_state"].to(aux[0].dtype))
            assert torch.equal(last, before["target"].to(last.dtype))


def test_samples_of_few_tokens_are_converted_and_links_to_nowhere_named(
    tiny: TinyInputs, capsys: Capture
) -> None:
    folder = tiny.folder / "short"
    folder.mkdir()
    for num_tokens in (0, 1, 2):
        content = {
            "input_ids": torch.arange(num_tokens),
            "loss_mask": torch.ones(num_tokens),
            "hidden_state": torch.randn(num_tokens, 3 * HIDDEN),
            "target": torch.randn(num_tokens, HIDDEN),
        }
        torch.save(content, folder / f"data_{num_tokens}.pt")
    (folder / "gone.pt").symlink_to("nowhere")

    code = convert(folder, "--output-dir", tiny.folder / "v1", "--json")

    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert [(Path(p["file"]).name, p["problem"]) for p in report["problems"]] == [
        ("gone.pt", "cannot be read: No such file or directory")
    ]
    assert report["num_converted"] == 3
    for num_tokens in (0, 1, 2):
        states = load(tiny.folder / "v1" / f"data_{num_tokens}.pt")["hidden_states"]
        assert [x.shape for x in states] == [(num_tokens, HIDDEN)] * 4


def test_the_norm_is_undone_so_that_any_reader_is_right(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    out_dir = tiny.folder / "v1"

    code = convert(
        *(v0_dir, "--output-dir", out_dir, "--undo-norm", "--json"),
        *("--verifier-name-or-path", tiny.verifier_dir),
    )

    report = json.loads(capsys.readouterr().out)
    gain = load_file(tiny.verifier_dir / "model.safetensors")["model.norm.weight"]
    files = sorted((v0_dir / "deeper").iterdir())
    assert code == 0
    # float32 keeps 24 bits; four operations round.
    assert 0 < report["largest_round_trip_error"] < 1e-6
    assert (report["layer_ids"], report["are_layer_ids_assumed"]) == ([3, 5, 7], True)
    assert len(files) == 12
    for file in files:
        new = load(out_dir / "deeper" / file.name)
        assert "last_hidden_state_is_normed" not in new
        torch.testing.assert_close(
            final_norm(new["hidden_states"][-1], gain), load(file)["target"], rtol=1e-5, atol=1e-6
        )


def test_a_norm_with_a_gain_near_zero_is_not_undone(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    verifier_dir = tiny.folder / "odd-verifier"
    verifier_dir.mkdir()
    (verifier_dir / "config.json").write_bytes((tiny.verifier_dir / "config.json").read_bytes())
    tensors = load_file(tiny.verifier_dir / "model.safetensors")
    tensors["model.norm.weight"][5] = 1e-6
    save_file(tensors, verifier_dir / "model.safetensors", {"format": "pt"})

    code = convert(
        *(v0_dir, "--output-dir", tiny.folder / "v1", "--undo-norm"),
        *("--verifier-name-or-path", verifier_dir),
    )

    assert code == 2
    assert "its smallest weight is 1.0e-06" in capsys.readouterr().err
    assert not (tiny.folder / "v1").exists()


def test_a_second_run_does_only_what_is_missing(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    out_dir = tiny.folder / "v1"
    convert(v0_dir, "--output-dir", out_dir)
    tree = {file: file.read_bytes() for file in out_dir.rglob("*.pt")}
    lost, torn = sorted(tree)[:2]
    lost.unlink()
    torn.write_bytes(tree[torn][:100])
    (out_dir / ".tmp-data_9.pt.123").touch()
    (out_dir / ".tmp-data_9.pt.124").write_bytes(tree[lost][:1000])
    (out_dir / ".tmp-data_9.pt.125").write_text("mine")
    (out_dir / ".tmp-mine").touch()
    kept = sorted(tree)[2]
    kept_at = kept.stat().st_mtime_ns
    capsys.readouterr()

    code = convert(v0_dir, "--output-dir", out_dir, "--json")

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["num_converted"], report["num_already_converted"]) == (2, 22)
    assert {file: file.read_bytes() for file in out_dir.rglob("*.pt")} == tree
    assert kept.stat().st_mtime_ns == kept_at
    left = {file.name for file in out_dir.rglob(".tmp-*")}
    assert left == {".tmp-data_9.pt.125", ".tmp-mine"}


@pytest.mark.parametrize("flags", [["--undo-norm"], ["--dtype", "bfloat16"]])
def test_files_converted_in_another_way_are_converted_again(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture, flags: list[str]
) -> None:
    out_dir = tiny.folder / "v1"
    verifier = ["--verifier-name-or-path", tiny.verifier_dir]
    convert(v0_dir, "--output-dir", out_dir, *verifier)
    capsys.readouterr()

    convert(v0_dir, "--output-dir", out_dir, *verifier, *flags, "--json")

    report = json.loads(capsys.readouterr().out)
    new = load(out_dir / "data_0.pt")
    assert (report["num_converted"], report["num_already_converted"]) == (24, 0)
    is_undone = flags == ["--undo-norm"]
    assert report["last_hidden_states_are_normed"] is not is_undone
    assert ("last_hidden_state_is_normed" not in new) == is_undone
    assert (new["hidden_states"][0].dtype == torch.bfloat16) != is_undone


@pytest.mark.parametrize("flags", [[], ["--undo-norm"], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize("part", ["hidden_state", "target"])
def test_states_that_were_captured_anew_are_converted_again(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture, flags: list[str], part: str
) -> None:
    out_dir, fresh_dir = tiny.folder / "v1", tiny.folder / "fresh"
    verifier = ["--verifier-name-or-path", tiny.verifier_dir]
    convert(v0_dir, "--output-dir", out_dir, *verifier, *flags)
    sample = load(v0_dir / "data_0.ckpt")
    sample[part] = sample[part] * 1.5
    torch.save(sample, v0_dir / "data_0.ckpt")
    capsys.readouterr()

    convert(v0_dir, "--output-dir", out_dir, *verifier, *flags, "--json")

    report = json.loads(capsys.readouterr().out)
    convert(v0_dir, "--output-dir", fresh_dir, *verifier, *flags)
    assert (report["num_converted"], report["num_already_converted"]) == (1, 23)
    assert (out_dir / "data_0.pt").read_bytes() == (fresh_dir / "data_0.pt").read_bytes()


def test_states_without_checksums_are_compared_by_their_bytes(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    flags = [v0_dir, "--output-dir", tiny.folder / "v1", "--json"]
    torch.serialization.set_crc32_options(False)
    try:
        sample = load(v0_dir / "data_0.ckpt")
        torch.save(sample, v0_dir / "data_0.ckpt")
        convert(*flags)
        capsys.readouterr()
        convert(*flags)
        same = json.loads(capsys.readouterr().out)
        torch.save(sample | {"target": sample["target"] * 2}, v0_dir / "data_0.ckpt")
        convert(*flags)
        other = json.loads(capsys.readouterr().out)
    finally:
        torch.serialization.set_crc32_options(True)

    assert (same["num_converted"], other["num_converted"]) == (0, 1)
    assert torch.equal(
        load(tiny.folder / "v1/data_0.pt")["hidden_states"][-1], 2 * sample["target"]
    )


def test_states_undone_with_the_norm_of_another_verifier_are_converted_again(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    out_dir, other_dir = tiny.folder / "v1", tiny.folder / "other-verifier"
    other_dir.mkdir()
    (other_dir / "config.json").write_bytes((tiny.verifier_dir / "config.json").read_bytes())
    tensors = load_file(tiny.verifier_dir / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other_dir / "model.safetensors", {"format": "pt"})
    flags = [v0_dir, "--output-dir", out_dir, "--undo-norm", "--verifier-name-or-path"]
    convert(*flags, other_dir)
    capsys.readouterr()

    convert(*flags, tiny.verifier_dir, "--json")

    assert json.loads(capsys.readouterr().out)["num_converted"] == 24
    gain = load_file(tiny.verifier_dir / "model.safetensors")["model.norm.weight"]
    new, old = load(out_dir / "data_0.pt"), load(v0_dir / "data_0.ckpt")
    torch.testing.assert_close(new["hidden_states"][-1] * gain, old["target"])


def test_float32_states_shrink_to_bfloat16(tiny: TinyInputs, v0_dir: Path) -> None:
    out_dir = tiny.folder / "v1"

    convert(v0_dir, "--output-dir", out_dir, "--dtype", "bfloat16")

    old, new = load(v0_dir / "data_0.ckpt"), load(out_dir / "data_0.pt")
    assert {states.dtype for states in new["hidden_states"]} == {torch.bfloat16}
    assert torch.equal(new["hidden_states"][-1], old["target"].bfloat16())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sources_go_once_their_copies_were_read_back(
    tiny: TinyInputs, v0_dir: Path, dtype: str | None
) -> None:
    out_dir = tiny.folder / "v1"
    (v0_dir / "broken.pt").write_text("<html>")

    code = convert(
        *(v0_dir, "--output-dir", out_dir, "--delete-source"),
        *(["--dtype", dtype] if dtype else []),
    )

    assert code == 1
    assert [file.name for file in v0_dir.rglob("*") if file.is_file()] == ["broken.pt"]
    assert len(list(out_dir.rglob("*.pt"))) == 24


@pytest.mark.parametrize("flags", [[], ["--undo-norm"], ["--dtype", "bfloat16"]])
def test_a_source_left_beside_its_copy_is_removed_by_the_next_run(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture, flags: list[str]
) -> None:
    more = ["--verifier-name-or-path", tiny.verifier_dir, *flags]
    # As a run leaves them that ends between a copy and the removal of its source.
    convert(v0_dir, "--output-dir", tiny.folder / "v1", *more)
    copies = {file: file.read_bytes() for file in (tiny.folder / "v1").rglob("*.pt")}
    capsys.readouterr()

    code = convert(v0_dir, "--output-dir", tiny.folder / "v1", *more, "--delete-source", "--json")

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["num_converted"], report["num_sources_removed"]) == (0, 24)
    assert not [file for file in v0_dir.rglob("*") if file.is_file()]
    assert {file: file.read_bytes() for file in (tiny.folder / "v1").rglob("*.pt")} == copies


def test_a_source_is_converted_again_before_it_goes_if_its_copy_is_damaged(
    tiny: TinyInputs, v0_dir: Path
) -> None:
    convert(v0_dir, "--output-dir", tiny.folder / "v1")
    target = tiny.folder / "v1/data_0.pt"
    whole = target.read_bytes()
    damaged = bytearray(whole)
    at = whole.index(load(v0_dir / "data_0.ckpt")["target"].numpy().tobytes())
    damaged[at + 40] ^= 1
    target.write_bytes(bytes(damaged))

    code = convert(v0_dir, "--output-dir", tiny.folder / "v1", "--delete-source")

    assert code == 0
    assert target.read_bytes() == whole
    assert not (v0_dir / "data_0.ckpt").exists()


@pytest.mark.parametrize("flags", [[], ["--undo-norm"], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize("part", ["hidden_states", "last_hidden_states"])
def test_a_source_stays_if_its_copy_reads_back_otherwise(
    tiny: TinyInputs,
    v0_dir: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    part: str,
) -> None:
    finish = v1.finish

    def write_other_states(writer: Any, layers: Any, *tokens: Any, is_normed: bool) -> None:
        layer = -1 if part == "last_hidden_states" else 0
        changed = [*layers]
        spec = changed[layer]
        data = bytes(spec.num_bytes)
        changed[layer] = writer.add([data], spec.dtype, spec.shape)
        finish(writer, changed, *tokens, is_normed=is_normed)

    monkeypatch.setattr(v1, "finish", write_other_states)
    code = convert(
        *(v0_dir, "--output-dir", tiny.folder / "v1", "--delete-source", "--json"),
        *("--verifier-name-or-path", tiny.verifier_dir, *flags),
    )

    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert len(report["problems"]) == 24
    assert {"differs from its copy" in p["problem"] for p in report["problems"]} == {True}
    assert len([f for f in v0_dir.rglob("*") if f.is_file()]) == 24


def flip_a_bit(file: Path) -> None:
    """The lowest bit of one last hidden state."""
    content = bytearray(file.read_bytes())
    content[content.index(load(file)["target"].numpy().tobytes()) + 40] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("flags", [["--undo-norm"], ["--dtype", "bfloat16"], ["--delete-source"]])
def test_damaged_states_are_neither_computed_with_nor_deleted(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture, flags: list[str]
) -> None:
    flip_a_bit(v0_dir / "data_0.ckpt")

    code = convert(
        *(v0_dir, "--output-dir", tiny.folder / "v1", "--json"),
        *("--verifier-name-or-path", tiny.verifier_dir, *flags),
    )

    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert code == 1
    assert problem["file"] == str(v0_dir / "data_0.ckpt")
    assert "has flipped bytes in" in problem["problem"]
    assert (v0_dir / "data_0.ckpt").exists()
    assert not (tiny.folder / "v1" / "data_0.pt").exists()


def test_damage_that_is_copied_stays_damage(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    # The copy has the checksum that was computed when the source was written.
    flip_a_bit(v0_dir / "data_0.ckpt")
    assert convert(v0_dir, "--output-dir", tiny.folder / "v1") == 0
    capsys.readouterr()

    code = run(["inspect-data", str(tiny.folder / "v1"), "--verify", "--json"])

    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert code == 1
    assert problem["file"] == str(tiny.folder / "v1" / "data_0.pt")
    assert "has flipped bytes in" in problem["problem"]


def test_copying_waits_for_neither_torch_nor_transformers(tiny: TinyInputs, v0_dir: Path) -> None:
    script = (
        "import sys; from speculators_cli.cli.app import run; code = run(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    flags = ["convert-v0", v0_dir, "--output-dir", tiny.folder / "v1"]

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, flags)], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "0 []"
    assert len(list((tiny.folder / "v1").rglob("*.pt"))) == 24


def test_the_verifier_is_read_once(
    tiny: TinyInputs, v0_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, names = verifier.read_verifier_config, []

    def count(files: Any, **options: bool) -> Any:
        names.append(files.name_or_path)
        return read(files, **options)

    monkeypatch.setattr(verifier, "read_verifier_config", count)

    code = convert(
        *(v0_dir, "--output-dir", tiny.folder / "v1", "--undo-norm"),
        *("--verifier-name-or-path", tiny.verifier_dir),
    )

    assert (code, names) == (0, [str(tiny.verifier_dir)])


def test_a_layernorm_is_not_undone(tiny: TinyInputs, v0_dir: Path, capsys: Capture) -> None:
    config = transformers.CohereConfig(
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=9,
        num_attention_heads=6,
        vocab_size=37,
        pad_token_id=0,
    )
    model: Any = transformers.CohereForCausalLM(config)
    model.save_pretrained(tiny.folder / "layernorm")
    undo = ("--undo-norm", "--verifier-name-or-path", tiny.folder / "layernorm")

    code = convert(v0_dir, "--output-dir", tiny.folder / "v1", *undo)

    assert code == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "cannot be undone: it is a LayerNorm, which subtracts the mean" in err
    assert not (tiny.folder / "v1").exists()


def test_a_dry_run_writes_nothing(tiny: TinyInputs, v0_dir: Path, capsys: Capture) -> None:
    out_dir = tiny.folder / "v1"

    code = convert(v0_dir, "--output-dir", out_dir, "--dry-run")

    assert code == 0
    assert "Would convert 24 of 24 samples" in capsys.readouterr().out
    assert not out_dir.exists()


def test_files_that_cannot_be_read_are_listed(
    tiny: TinyInputs, v0_dir: Path, capsys: Capture
) -> None:
    sample = load(v0_dir / "data_0.ckpt")
    torch.save({k: v for k, v in sample.items() if k != "target"}, v0_dir / "no_target.pt")
    torch.save(sample | {"hidden_states": [torch.zeros(2, HIDDEN)]}, v0_dir / "data_0.pt")
    (v0_dir / "torn.pt").write_bytes((v0_dir / "data_0.ckpt").read_bytes()[:500])

    code = convert(v0_dir, "--output-dir", tiny.folder / "v1", "--json")

    report = json.loads(capsys.readouterr().out)
    problems = {Path(p["file"]).name: p["problem"] for p in report["problems"]}
    assert code == 1
    assert "has no `target`" in problems["no_target.pt"]
    assert "truncated" in problems["torn.pt"]
    # `data_0.ckpt` comes first and takes the name.
    assert "as another file is" in problems["data_0.pt"]
    assert len(list((tiny.folder / "v1").rglob("*.pt"))) == 24


def test_nothing_is_written_through_a_link(tiny: TinyInputs, v0_dir: Path, capsys: Capture) -> None:
    out_dir, elsewhere = tiny.folder / "v1", tiny.folder / "elsewhere"
    out_dir.mkdir()
    elsewhere.mkdir()
    (out_dir / "deeper").symlink_to(elsewhere)

    code = convert(v0_dir, "--output-dir", out_dir)

    assert code == 1
    assert "written through a link" in capsys.readouterr().out
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["nowhere", "--output-dir", "v1"], 2, "`V0_PATH`: `nowhere` does not exist"),
        (["v0"], 2, "`--output-dir` is required"),
        (["v0", "--output-dir", "v0"], 2, "must lie outside"),
        (["v0", "--output-dir", "v0/deeper/v1"], 2, "must lie outside"),
        (["v0", "--output-dir", "v1", "--undo-norm"], 2, "needs `--verifier-name-or-path`"),
        (["v0", "--output-dir", "v1", "--dtype", "int8"], 2, "`--dtype`"),
        (["v0", "--output-dir", "v1", "--target-layer-ids", "5,3"], 2, "strictly ascending"),
        (["v0", "--output-dir", "v1", "--target-layer-ids", "3,5"], 3, "have 3 aux layers"),
        (["data", "--output-dir", "v1"], 3, "is a v1 sample, read as v0"),
        (["empty", "--output-dir", "v1"], 3, "holds no samples"),
    ],
)
@pytest.mark.usefixtures("v0_dir")
def test_bad_input_writes_nothing(
    tiny: TinyInputs,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tiny.folder)
    Path("empty").mkdir()

    assert convert(*flags) == code

    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not Path("v1").exists()


def test_layer_ids_go_with_the_samples(tiny: TinyInputs, v0_dir: Path) -> None:
    (v0_dir / "data_config.json").write_text(
        json.dumps({"version": "2.0", "hidden_states": {"layer_ids": [1, 4, 6, 8]}})
    )
    said, given = tiny.folder / "said", tiny.folder / "given"

    convert(v0_dir, "--output-dir", said)
    convert(v0_dir, "--output-dir", given, "--target-layer-ids", "1,2,9")

    written = [json.loads((d / "data_config.json").read_text()) for d in (said, given)]
    assert [x["hidden_states"]["layer_ids"] for x in written] == [[2, 5, 7], [1, 2, 9]]
    assert [x["hidden_states"]["layer_ids_assumed"] for x in written] == [False, False]


@pytest.mark.parametrize(
    ("flags", "factor", "fits"),
    [
        ([], 0.9, False),
        ([], 1.1, True),
        (["--dtype", "bfloat16"], 0.6, True),
        (["--dtype", "bfloat16"], 0.4, False),
        (["--delete-source", "--workers", "2"], 0.3, True),
        (["--delete-source", "--workers", "24"], 0.3, False),
    ],
)
def test_room_is_checked_first(
    tiny: TinyInputs,
    v0_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    factor: float,
    fits: bool,
) -> None:
    out_dir = tiny.folder / "v1"
    total = sum(file.stat().st_size for file in v0_dir.rglob("*") if file.is_file())
    usage = SimpleNamespace(free=int(factor * total))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    code = convert(v0_dir, "--output-dir", out_dir, *flags)

    assert code == (0 if fits else 5)
    assert out_dir.exists() == fits


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_leaves_whole_files_only(tiny: TinyInputs, v0_dir: Path) -> None:
    disk = tiny.folder / "disk"
    disk.mkdir()
    total = sum(file.stat().st_size for file in v0_dir.rglob("*") if file.is_file())
    # The disk fills up behind the check of its space: so another file is written beside.
    script = (
        f"mount -t tmpfs -o size={total + 65536} none {disk} || exit 77; "
        f"{sys.executable} -c '{FILL}' {v0_dir} {disk}; code=$?; "
        f"find {disk} -name '.tmp-*' | wc -l; exit $code"
    )

    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, check=False
    )

    if done.returncode in (1, 77) and "mount" in done.stderr:
        pytest.skip("may not mount a tmpfs")
    assert done.returncode == 5, done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert done.stdout.strip() == "0"


FILL = """
import sys
from pathlib import Path
from speculators_cli.core.preparation import conversion
check = conversion.check_space
def check_then_fill(jobs, files):
    check(jobs, files)
    num_bytes = sum(job.num_bytes for job in jobs)
    (Path(sys.argv[2]) / "other").write_bytes(bytes(num_bytes // 2))
conversion.check_space = check_then_fill
from speculators_cli.cli.app import run
sys.exit(run(["convert-v0", sys.argv[1], "--output-dir", sys.argv[2] + "/v1"]))
"""
