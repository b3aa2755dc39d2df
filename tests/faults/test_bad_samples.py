"""One sick sample of 24: what `inspect-data` and `train` say of it, and that neither stops."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.cli.app import run
from tests.tiny_run import HIDDEN, VOCAB, TinyInputs

Capture = pytest.CaptureFixture[str]
Content = dict[str, Any]
SICK = "data_13.pt"


def inspect(folder: Path, capsys: Capture, *flags: object) -> tuple[int, Content]:
    capsys.readouterr()
    code = run(["inspect-data", str(folder), "--json", *map(str, flags)])
    report: Content = json.loads(capsys.readouterr().out)
    return code, report


def train(
    tiny: TinyInputs, folder: Path, capsys: Capture, **flags: object
) -> tuple[int, Content, str]:
    """Exit code, report and messages of a run over all samples, without validation."""
    capsys.readouterr()
    wanted = tiny.flags(data_path=folder, epochs=1, train_data_ratio=1.0, **flags)
    code = run(["train", *wanted, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def edited(edit: Callable[[Content], object]) -> Callable[[Path], object]:
    """A fault of what a file holds."""

    def damage(file: Path) -> None:
        content = torch.load(file, weights_only=True)
        edit(content)
        torch.save(content, file)

    return damage


def compress(file: Path) -> None:
    stream = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def states(edit: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Path], object]:
    return edited(lambda x: x.update(hidden_states=edit(x["hidden_states"])))


def expand(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros(1, 1).expand(len(x), HIDDEN) for x in layers]


# What is done to a file, and what is said of it. Numbers are those of the fault model's cases.
LEFT_OUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "12-empty": (lambda f: f.write_bytes(b""), "is empty (0 bytes)"),
    "12-truncated": (lambda f: os.truncate(f, f.stat().st_size // 2), "is truncated or damaged"),
    "12-html": (lambda f: f.write_text("<html>404</html>"), "is a web page"),
    "12-lfs": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "14-code": (
        lambda f: torch.save({"input_ids": Code(f.with_name("ran"))}, f),
        "would run `posix.mkdir` when loaded",
    ),
    "15-expanded": (states(expand), "(expanded or cut)"),
    "15-sparse": (states(lambda x: [y.to_sparse() for y in x]), "a sparse tensor"),
    "15-compressed": (compress, "is compressed"),
    "18-hidden-size": (states(lambda x: [y[:, :8].clone() for y in x]), "hidden size 8"),
    "18-layers": (states(lambda x: x[1:]), "2 aux layers"),
    "18-no-key": (edited(lambda x: x.pop("loss_mask")), "has no `loss_mask`"),
    "18-lengths": (states(lambda x: [x[0][:-1].clone(), *x[1:]]), "hidden states in layer 0"),
    "18-foreign": (lambda f: torch.save({"weights": torch.zeros(3)}, f), "has no `input_ids`"),
    "19-integers": (states(lambda x: [y.int() for y in x]), "expected floats"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_sample_that_cannot_be_read_is_named_and_left_out(
    name: str, data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    damage, reason = LEFT_OUT[name]
    damage(data_dir / SICK)

    code, found = inspect(data_dir, capsys)
    train_code, report, err = train(tiny, data_dir, capsys)

    (problem,) = found["problems"]
    assert code == 1
    assert Path(problem["file"]).name == SICK
    assert reason in problem["problem"]
    assert train_code == 0
    assert report["num_bad_samples"] == 1
    assert f"{SICK}` " in err
    assert reason in " ".join(err.split())
    assert not (data_dir / "ran").exists()


@pytest.mark.parametrize("name", ["12-html", "14-code", "18-no-key"])
def test_more_than_may_be_bad_stop_the_run_before_it_begins(
    name: str, data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    # 1 % of 24 samples is one of them.
    for number in (7, 13):
        LEFT_OUT[name][0](data_dir / f"data_{number}.pt")

    code, report, err = train(tiny, data_dir, capsys)

    assert (code, report) == (3, {})
    assert "2 of 24 samples cannot be used" in err
    assert "--max-bad-samples 2" in err
    assert not tiny.save_path.exists()


def test_flipped_bytes_are_found_where_every_byte_is_read(data_dir: Path, capsys: Capture) -> None:
    file = data_dir / SICK
    needle = torch.load(file, weights_only=True)["hidden_states"][1].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(needle) + 9] ^= 4
    file.write_bytes(bytes(content))

    code, found = inspect(data_dir, capsys, "--verify")

    (problem,) = found["problems"]
    assert code == 1
    assert Path(problem["file"]).name == SICK
    assert "has flipped bytes in" in problem["problem"]


def test_links_are_followed_and_pipes_left_alone(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    (data_dir / "self").symlink_to(data_dir)
    (data_dir / SICK).rename(tiny.folder / "far.pt")
    (data_dir / SICK).symlink_to(tiny.folder / "far.pt")
    os.mkfifo(data_dir / "pipe.pt")

    code, found = inspect(data_dir, capsys)
    train_code, report, _ = train(tiny, data_dir, capsys)

    assert (code, found["num_samples"]) == (0, 24)
    assert (train_code, report["num_bad_samples"]) == (0, 0)


def test_mixed_types_are_counted_and_trained_on(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    states(lambda x: [y.bfloat16() for y in x])(data_dir / SICK)

    code, found = inspect(data_dir, capsys)
    train_code, report, _ = train(tiny, data_dir, capsys)

    assert (code, found["dtypes"]) == (0, {"float32": 23, "bfloat16": 1})
    assert (train_code, report["num_bad_samples"]) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_named_and_not_learnt(
    value: float, data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edited(lambda x: x["hidden_states"][2][5, 3:5].fill_(value))(data_dir / SICK)

    code, found = inspect(data_dir, capsys)
    train_code, report, err = train(tiny, data_dir, capsys)

    (problem,) = found["problems"]
    assert code == 1
    assert problem["problem"] == "has 2 non-finite values in layer 2"
    assert (train_code, report["num_bad_samples"], report["num_skipped_steps"]) == (0, 1, 0)
    assert f"{SICK}`: its hidden states are not all finite" in " ".join(err.split())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda x: x["loss_mask"].zero_(), "has no supervised token"),
        (
            lambda x: x.update(
                input_ids=torch.zeros(0, dtype=torch.long),
                loss_mask=torch.zeros(0),
                hidden_states=[torch.zeros(0, HIDDEN)] * 4,
            ),
            "has 0 tokens, too few for training",
        ),
    ],
    ids=["unsupervised", "empty"],
)
def test_samples_that_teach_nothing_are_counted(
    edit: Callable[[Content], object],
    reason: str,
    data_dir: Path,
    tiny: TinyInputs,
    capsys: Capture,
) -> None:
    edited(edit)(data_dir / SICK)

    code, found = inspect(data_dir, capsys)
    train_code, report, err = train(tiny, data_dir, capsys)

    (problem,) = found["problems"]
    assert (code, problem["problem"]) == (1, reason)
    assert (train_code, report["num_skipped_steps"]) == (0, 0)
    assert "1 of 24 samples have no supervised token" in " ".join(err.split())


def test_a_sample_longer_than_a_packed_sequence_is_cut_and_counted(
    tiny: TinyInputs, capsys: Capture
) -> None:
    lengths = [
        len(torch.load(f, weights_only=True)["input_ids"]) for f in tiny.data_dir.glob("*.pt")
    ]
    longest = max(lengths)
    num_longest = lengths.count(longest)

    # A token cannot be predicted, so one less than the tokens of a sample is packed.
    code, _, err = train(tiny, tiny.data_dir, capsys, total_seq_len=longest - 2)

    assert code == 0
    expected = (
        f"{num_longest} of 24 samples are longer than a packed sequence: "
        f"{num_longest} tokens are truncated"
    )
    assert sum(length > longest - 1 for length in lengths) == num_longest
    assert expected in " ".join(err.split())


def test_ids_that_the_verifier_does_not_have_are_refused(
    data_dir: Path, tiny: TinyInputs, capsys: Capture
) -> None:
    edited(lambda x: x["input_ids"].__setitem__(4, VOCAB))(data_dir / SICK)

    code, found = inspect(data_dir, capsys, "--verifier-name-or-path", tiny.verifier_dir)
    train_code, _, err = train(tiny, data_dir, capsys)

    assert code == 1
    assert any(f"has token id {VOCAB}" in p["problem"] for p in found["problems"])
    assert train_code == 3
    assert f"token ids up to {VOCAB}" in " ".join(err.split())
