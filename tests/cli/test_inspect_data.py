"""`speculators inspect-data` as the user types it."""

import gzip
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.data.formats.detect import read_again
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.preparation import inspection
from tests.cli.golden import assert_golden
from tests.generated_samples import sample_files
from tests.tiny_run import VOCAB, TinyInputs, write_as_specforge

Capture = pytest.CaptureFixture[str]
Content = dict[str, Any]


def inspect(*flags: object) -> int:
    return run(["inspect-data", *map(str, flags)])


def report_of(capsys: Capture, *flags: object) -> tuple[int, Content]:
    capsys.readouterr()
    code = inspect(*flags, "--json")
    report: Content = json.loads(capsys.readouterr().out)
    return code, report


def problems_of(report: Content) -> dict[str, str]:
    return {Path(p["file"]).name: p["problem"] for p in report["problems"]}


def change(file: Path, edit: Callable[[Content], object]) -> None:
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


def test_counts_are_those_of_the_files(tiny: TinyInputs, capsys: Capture) -> None:
    code, report = report_of(capsys, tiny.data_dir, "--total-seq-len", 64)

    samples = [torch.load(f, weights_only=True) for f in tiny.data_dir.glob("*.pt")]
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert code == 0
    assert report["format"] == "v1"
    assert (report["num_samples"], report["num_tokens"]) == (24, sum(lengths))
    assert report["tokens"]["median"] == statistics.median(lengths)
    assert (report["tokens"]["min"], report["tokens"]["max"]) == (min(lengths), max(lengths))
    assert sum(report["tokens"]["histogram"]) == 24
    assert report["num_supervised_tokens"] == sum(n - 3 for n in lengths)
    assert (report["hidden_size"], report["num_aux_layers"]) == (24, 3)
    assert report["dtypes"] == {"float32": 24}
    used = sum(n - 1 for n in lengths)
    assert report["fill"] == used / (report["num_packed_sequences"] * 64) > 0.9
    assert len(report["layer_rms"]) == 4
    assert report["problems"] == []


def test_the_page_for_people_has_the_same(tiny: TinyInputs, capsys: Capture) -> None:
    code = inspect(tiny.data_dir)

    out = capsys.readouterr().out
    assert code == 0
    assert "24 samples, format v1, 3 aux layers, hidden size 24, float32" in out
    assert "supervised tokens" in out
    assert "No problems found" in out


EDITS: dict[str, tuple[Callable[[Content], object], str]] = {
    "nan": (
        lambda x: x["hidden_states"][1][4, 2:4].fill_(float("nan")),
        "has 2 non-finite values in layer 1",
    ),
    "zeros": (lambda x: x["hidden_states"][0].zero_(), "has only zeros in layer 0"),
    "constant": (
        lambda x: x["hidden_states"][2].copy_(x["hidden_states"][2][:1].clone()),
        "has the same states at every token in layer 2",
    ),
    "equal-layers": (
        lambda x: x["hidden_states"][1].copy_(x["hidden_states"][0]),
        "has the same states in layers 0 and 1",
    ),
    "scale": (lambda x: x["hidden_states"][3].mul_(100), "has layer 3 at"),
    "unsupervised": (lambda x: x["loss_mask"].zero_(), "has no supervised token"),
    "full-mask": (lambda x: x["loss_mask"].fill_(1), "has all tokens supervised"),
    "no-mask": (lambda x: x.pop("loss_mask"), "has no `loss_mask`"),
    "unequal": (
        lambda x: x.update(input_ids=x["input_ids"][:-1], loss_mask=x["loss_mask"][:-1]),
        "hidden states in layer 0",
    ),
    "integers": (
        lambda x: x.update(hidden_states=[h.long() for h in x["hidden_states"]]),
        "expected floats",
    ),
    "two-layers": (lambda x: x["hidden_states"].pop(), "and 2 aux layers, most are v1"),
    "v0": (
        lambda x: x.update(
            hidden_state=torch.cat(x["hidden_states"][:3], -1), target=x.pop("hidden_states")[3]
        ),
        "is v0 with hidden size 24",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_one_sick_sample_is_named(data_dir: Path, capsys: Capture, name: str) -> None:
    edit, expected = EDITS[name]
    change(data_dir / "data_5.pt", edit)

    code, report = report_of(capsys, data_dir)

    problems = problems_of(report)
    assert code == 1
    assert list(problems) == ["data_5.pt"]
    assert expected in problems["data_5.pt"]


def raise_ids(content: Content) -> None:
    content["input_ids"] += VOCAB


def cut_states(content: Content) -> None:
    content["hidden_states"] = [states[:, :16].clone() for states in content["hidden_states"]]


@pytest.mark.parametrize(
    ("edit", "of_folder"),
    [(raise_ids, set()), (cut_states, {"has hidden size 16, the verifier 24"})],
)
def test_only_what_differs_from_the_verifier_is_reported(
    data_dir: Path,
    tiny: TinyInputs,
    capsys: Capture,
    edit: Callable[[Content], None],
    of_folder: set[str],
) -> None:
    # Trap: token ids out of range, reported as another hidden size.
    for file in data_dir.glob("*.pt"):
        change(file, edit)

    code, report = report_of(capsys, data_dir, "--verifier-name-or-path", tiny.verifier_dir)

    assert code == 1
    found = {p["problem"] for p in report["problems"] if Path(p["file"]) == data_dir}
    of_files = [p for p in report["problems"] if Path(p["file"]) != data_dir]
    assert found == of_folder
    assert len(of_files) == (0 if of_folder else 24)
    assert all("beyond the verifier's vocabulary of 37" in p["problem"] for p in of_files)


def test_files_that_are_no_samples_are_named(data_dir: Path, capsys: Capture) -> None:
    (data_dir / "page.pt").write_text("<html>")
    (data_dir / "empty.pt").touch()
    (data_dir / "token_freq.pt").touch()
    (data_dir / "twice.pt").write_bytes((data_dir / "data_1.pt").read_bytes())

    code, report = report_of(capsys, data_dir)

    problems = problems_of(report)
    assert code == 1
    assert problems.keys() == {"page.pt", "empty.pt", "twice.pt"}
    assert "web page" in problems["page.pt"]
    assert "has the same tokens as" in problems["twice.pt"]


def test_samples_that_shrink_or_vanish_once_they_are_found_are_named(
    data_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, gone = sorted(data_dir.glob("*.pt"))[:2]

    def read(file: Path, data_format: str) -> Sample:
        if file == gone:
            file.unlink()
        sample = read_again(file, data_format)
        if file == cut:
            os.truncate(file, 4096)
        return sample

    monkeypatch.setattr(inspection, "read_again", read)
    code, report = report_of(capsys, data_dir, "--samples", 24)

    assert code == 1
    assert problems_of(report) == {
        cut.name: "can no longer be read: is shorter than it was",
        gone.name: "can no longer be read: No such file or directory",
    }


def test_flipped_bytes_are_found_when_every_byte_is_read(data_dir: Path, capsys: Capture) -> None:
    file = data_dir / "data_7.pt"
    states = torch.load(file, weights_only=True)["hidden_states"][2]
    content = bytearray(file.read_bytes())
    # The lowest bit of one value of one layer.
    content[content.index(states.numpy().tobytes()) + 40] ^= 1
    file.write_bytes(bytes(content))

    code, report = report_of(capsys, data_dir)
    assert (code, report["problems"]) == (0, [])

    code, report = report_of(capsys, data_dir, "--verify")
    assert code == 1
    assert "has flipped bytes in" in problems_of(report)["data_7.pt"]


def test_ids_beyond_the_vocabulary_are_named(
    tiny: TinyInputs, data_dir: Path, capsys: Capture
) -> None:
    change(data_dir / "data_3.pt", lambda x: x["input_ids"][2:3].fill_(VOCAB))

    code, report = report_of(
        capsys, data_dir, "--verifier-name-or-path", tiny.verifier_dir, "--samples", 24
    )

    assert code == 1
    assert (
        "has token id 37, beyond the verifier's vocabulary of 37"
        in problems_of(report)["data_3.pt"]
    )


def edited_copy(source: Path, target: Path, edit: Callable[[Content], object]) -> Path:
    target.mkdir()
    for file in sample_files(source):
        content = torch.load(file, weights_only=True)
        edit(content)
        torch.save(content, target / file.name)
    return target


def test_the_verifiers_head_predicts_its_own_samples(
    captured_dir: Path, verifier_dir: Path, capsys: Capture
) -> None:
    code, report = report_of(capsys, captured_dir, "--verifier-name-or-path", verifier_dir)

    assert code == 0
    assert report["agreement"]["with_norm"] > 0.95
    assert report["agreement"]["without_norm"] < report["agreement"]["with_norm"] - 0.1
    assert report["verifier"] == "the-verifier"
    assert (report["layer_ids"], report["layer_ids_convention"]) == ([2, 4, 5], "vllm")


def test_states_marked_wrongly_as_normed_are_found(
    captured_dir: Path, verifier_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Trap: 25 % against 40 % acceptance.
    folder = edited_copy(
        captured_dir,
        tmp_path / "marked",
        lambda x: x.update(last_hidden_state_is_normed=torch.tensor(True)),
    )

    code, report = report_of(capsys, folder, "--verifier-name-or-path", verifier_dir)

    assert code == 1
    assert "marked as after the final norm" in problems_of(report)["marked"]


def test_states_shifted_by_one_are_found(
    captured_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = edited_copy(
        captured_dir,
        tmp_path / "shifted",
        lambda x: x["hidden_states"].append(x["hidden_states"].pop().roll(7, 0)),
    )

    code, report = report_of(capsys, folder, "--verifier-name-or-path", VERIFIER_DIR)

    assert code == 1
    assert "does not match this verifier, or is misaligned" in problems_of(report)["shifted"]


def test_the_text_of_a_sample_shows_what_is_supervised(captured_dir: Path, capsys: Capture) -> None:
    code = inspect(captured_dir, "--show", 0, "--verifier-name-or-path", VERIFIER_DIR)

    out = capsys.readouterr().out
    prompt, answer = out.split("«")
    assert code == 0
    assert prompt.endswith(read_prompts()[0])
    assert len(answer.strip()) > 10
    assert "»" in answer


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["nowhere"], 2, "`DATA_PATH`: `nowhere` does not exist"),
        (["empty"], 3, "no `.pt`, `.ckpt` or `hs_*.safetensors` file was found"),
        (["foreign"], 3, "None of the 1 files in `foreign` is a sample"),
        (["data", "--show", "99", "--verifier-name-or-path", "verifier"], 2, "no sample 99"),
        (["data", "--show", "1"], 2, "needs the verifier's tokenizer"),
        (["data", "--show", "1", "--verifier-name-or-path", "verifier"], 2, "has no tokenizer"),
        (["data", "--verifier-name-or-path", "./nowhere"], 2, "does not exist"),
    ],
)
def test_bad_input_is_explained(
    tiny: TinyInputs,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tiny.folder)
    Path("empty").mkdir()
    Path("foreign").mkdir()
    torch.save({"weights": torch.zeros(3)}, "foreign/model.pt")

    assert inspect(*flags) == code

    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def write_layer_ids(folder: Path, ids: list[int], **content: object) -> None:
    said = {"hidden_states": {"layer_ids": ids, "layer_ids_convention": "vllm"}, **content}
    folder.mkdir(exist_ok=True)
    (folder / "data_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([3, 5], "The samples have 3 aux layers, but the layer ids are `3,5`"),
        ([3, 3, 7], "Layer ids `3,3,7` are not strictly ascending"),
        ([3, 5, 10], "between 0 and the verifier's 9 layers"),
    ],
)
def test_layer_ids_that_contradict_the_samples_are_found(
    data_dir: Path, tiny: TinyInputs, capsys: Capture, ids: list[int], expected: str
) -> None:
    write_layer_ids(data_dir, ids)

    code, report = report_of(capsys, data_dir, "--verifier-name-or-path", tiny.verifier_dir)

    assert code == 1
    assert any(expected in p["problem"] for p in report["problems"])


def test_folders_that_hold_different_layers_are_found(data_dir: Path, capsys: Capture) -> None:
    write_layer_ids(data_dir, [3, 5, 7])
    write_layer_ids(data_dir / "more", [2, 5, 7])

    code, report = report_of(capsys, data_dir)

    assert code == 1
    assert "different verifier layers" in problems_of(report)["copied"]


def test_time_and_disk_rate_of_an_epoch_follow_from_the_speed(
    tiny: TinyInputs, capsys: Capture
) -> None:
    _, report = report_of(capsys, tiny.data_dir, "--tokens-per-second", 100)

    num_bytes = sum(file.stat().st_size for file in tiny.data_dir.glob("*.pt"))
    assert report["epoch_seconds"] == report["num_tokens"] / 100
    assert report["disk_bytes_per_second"] == pytest.approx(num_bytes / report["epoch_seconds"])


def test_the_report_is_the_golden_one(data_dir: Path, capsys: Capture) -> None:
    change(data_dir / "data_5.pt", lambda x: x["loss_mask"].zero_())

    _, report = report_of(capsys, data_dir, "--total-seq-len", 64)

    assert_golden(report, "inspect-data", data_dir)


def test_a_folder_of_specforges_is_recognised(tiny: TinyInputs, capsys: Capture) -> None:
    folder = write_as_specforge(tiny.data_dir, tiny.folder / "specforge")

    code, report = report_of(capsys, folder)

    assert code == 0
    assert (report["format"], report["num_samples"], report["is_normed"]) == ("specforge", 24, True)


def test_a_folder_of_specforges_may_be_packed(tiny: TinyInputs, capsys: Capture) -> None:
    folder = write_as_specforge(tiny.data_dir, tiny.folder / "specforge")
    _, unpacked = report_of(capsys, folder)
    for file in folder.glob("*.ckpt"):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()

    code, report = report_of(capsys, folder, "--verify")

    assert code == 0
    same = ("format", "num_samples", "tokens", "supervised_tokens", "layer_rms", "problems")
    assert {key: report[key] for key in same} == {key: unpacked[key] for key in same}
    assert report["num_samples"] == 24


def test_a_folder_of_upstreams_is_recognised(capsys: Capture) -> None:
    folder = Path(__file__).parents[1] / "oracle" / "upstream-0.9.0-data" / "fp8"

    code, report = report_of(capsys, folder)

    assert code == 0
    assert (report["format"], report["num_samples"]) == ("speculators", 3)
    assert report["dtypes"] == {"float8_e4m3fn": 3}
    assert len(report["layer_rms"]) == 4
    assert 0.5 < report["layer_rms"][0] < 2


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(
    data_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = data_dir.rename(tmp_path / "a<b>")
    change(folder / "data_5.pt", lambda x: x["loss_mask"].zero_())
    page = tmp_path / "report.html"

    code, report = report_of(capsys, folder, "--html", page)

    text = page.read_text()
    svgs = [part.split("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    bars = [ElementTree.fromstring("<svg" + svg).findall("rect") for svg in svgs]  # noqa: S314
    heights = [float(bar.get("height", 0)) for bar in bars[0]]
    histogram = report["tokens"]["histogram"]
    assert code == 1
    assert [len(x) for x in bars] == [10, 10, 10, len(report["coverage_by_size"]), 4]
    # Written to a tenth of a pixel.
    assert heights == pytest.approx([144 * n / max(histogram) for n in histogram], abs=0.06)
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    assert "has no supervised token" in text
    assert "http" not in text


def test_coverage_is_that_of_the_most_frequent_supervised_tokens(
    tiny: TinyInputs, capsys: Capture
) -> None:
    _, report = report_of(capsys, tiny.data_dir)

    samples = [torch.load(file, weights_only=True) for file in tiny.data_dir.glob("*.pt")]
    ids = torch.cat([x["input_ids"][1:][x["loss_mask"][1:] == 1] for x in samples])
    counts = ids.bincount().sort(descending=True).values
    num_seen = int((counts > 0).sum())
    assert list(report["coverage_by_size"]) == ["1", "2", "4", "8", "16", "32", str(num_seen)]
    for size, share in report["coverage_by_size"].items():
        assert share == pytest.approx(float(counts[: int(size)].sum() / len(ids)))
    assert sum(report["supervised_fractions"]) == 24
