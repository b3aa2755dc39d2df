"""Commands read compact samples without being told; what does not depend on rounding is equal."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.data.formats import v1
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
COMPACT: dict[str, Mapping[str, Any]] = {
    "supervised only": {"supervised_only": True},
    "float8": {"storage_dtype": "float8"},
    "both": {"storage_dtype": "float8", "supervised_only": True},
}
# Not of the samples: how long a run took, and how much memory.
MEASURED = ("seconds", "per_second", "memory", "data_wait_share")


def write_compact(tiny: TinyInputs, **options: Any) -> Path:
    """Copies of the tiny samples; the first has no supervised token."""
    folder = tiny.folder / "compact"
    folder.mkdir()
    for i, file in enumerate(sorted(tiny.data_dir.glob("*.pt"))):
        sample = v1.FORMAT.read_sample(file)
        if i == 0:
            sample = replace(sample, loss_mask=torch.zeros_like(sample.loss_mask))
        v1.write_sample(sample, folder / file.name, **options)
    return folder


def report_of(capsys: Capture, *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    run([*map(str, flags), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def metrics_of(tiny: TinyInputs, data_dir: Path, name: str) -> list[dict[str, Any]]:
    save_path = tiny.folder / name
    flags = tiny.flags(data_path=data_dir, save_path=save_path, max_steps=2, quiet=True)
    assert run(["train", *flags]) == 0
    lines = read_metrics(save_path)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    return [
        {name: x for name, x in line.items() if not any(part in name for part in MEASURED)}
        for line in lines
    ]


def test_training_on_supervised_rows_has_the_same_bits(tiny: TinyInputs) -> None:
    plain = write_compact(tiny)
    whole = metrics_of(tiny, plain, "whole")
    plain.rename(tiny.folder / "plain")
    compact = metrics_of(tiny, write_compact(tiny, supervised_only=True), "only")

    assert "loss" in whole[0]
    assert compact == whole


def test_training_on_float8_is_near(tiny: TinyInputs) -> None:
    plain = write_compact(tiny)
    whole = metrics_of(tiny, plain, "whole")
    plain.rename(tiny.folder / "plain")
    compact = metrics_of(tiny, write_compact(tiny, **COMPACT["both"]), "float8")

    assert compact != whole
    # Each value is off by up to 2^-4, independently: sums over 24 of them by about 1 %.
    for one, other in zip(compact, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


@pytest.mark.parametrize("options", COMPACT.values(), ids=COMPACT)
def test_inspect_data_reads_compact_samples(
    tiny: TinyInputs, capsys: Capture, options: Mapping[str, Any]
) -> None:
    flags = ("--verifier-name-or-path", tiny.verifier_dir, "--verify")
    plain = report_of(capsys, "inspect-data", write_compact(tiny), *flags)
    (tiny.folder / "compact").rename(tiny.folder / "plain")

    report = report_of(capsys, "inspect-data", write_compact(tiny, **options), *flags)

    # The tokens are random, so that the head does not predict them; states have no problems.
    found, expected = ([x["problem"].split(":")[0] for x in r["problems"]] for r in (report, plain))
    assert found == expected
    assert len(found) == 2
    assert report["num_bytes"] < plain["num_bytes"]
    dtype = "float8_e4m3fn" if "storage_dtype" in options else "float32"
    assert report["dtypes"] == {dtype: 24}
    for name in ("num_samples", "num_tokens", "num_supervised_tokens", "coverage_by_size"):
        assert report[name] == plain[name]
    # The token before the answer does not exist, in 23 samples; one sample has no answer, and is
    # measured at all of its tokens that exist.
    num_lost = plain["agreement"]["num_positions"] - report["agreement"]["num_positions"]
    assert num_lost >= 23 if options.get("supervised_only") else num_lost == 0


def test_probabilities_are_measured_where_last_hidden_states_exist(
    tiny: TinyInputs, capsys: Capture
) -> None:
    report = report_of(
        capsys,
        *("build-vocab-map", "--data-path", write_compact(tiny, **COMPACT["both"])),
        *("--verifier-name-or-path", tiny.verifier_dir, "--draft-vocab-size", 19),
        *("--output-dir", tiny.folder / "maps"),
    )

    assert 0 < report["probability_mass"] < 1


def test_inspect_data_shows_the_storage(tiny: TinyInputs, capsys: Capture) -> None:
    folder = write_compact(tiny, **COMPACT["both"])

    run(["inspect-data", str(folder)])

    assert "float8_e4m3fn" in capsys.readouterr().out


@pytest.mark.parametrize("options", COMPACT.values(), ids=COMPACT)
def test_samples_without_supervised_tokens_are_no_problem_of_their_states(
    tiny: TinyInputs, capsys: Capture, options: Mapping[str, Any]
) -> None:
    folder = write_compact(tiny, **options)
    for file in sorted(folder.glob("*.pt"))[1:]:
        file.unlink()

    report = report_of(capsys, "inspect-data", folder, "--verifier-name-or-path", tiny.verifier_dir)

    assert report["num_supervised_tokens"] == 0
    assert not any("layer" in problem["problem"] for problem in report["problems"])


def test_a_plan_counts_the_host_memory_of_float8(tiny: TinyInputs, capsys: Capture) -> None:
    sizes = {}
    for name, options in COMPACT.items():
        folder = write_compact(tiny, **options)
        flags = tiny.flags(data_path=folder)
        sizes[name] = report_of(capsys, "train", "--plan", *flags)["plan"]
        shutil.rmtree(folder)
    found = {name: plan["host_prefetch_bytes"] for name, plan in sizes.items()}

    # One byte in place of the four of float32, for the same rows.
    assert found["supervised only"] == 4 * found["float8"] == 4 * found["both"] > 0
