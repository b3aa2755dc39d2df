"""The table of engine versions: what its words mean, and that the advice follows from it."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.export.targets.vllm import NEWEST_TRIED, OLDEST_TRIED, Vllm
from tests.vllm.exported_drafts import Served
from tests.vllm.try_versions import (
    EQUAL,
    NOT_RUN,
    OTHER,
    REFUSED,
    Outcome,
    Trial,
    judge,
    read_requirements,
    table,
)

PAGE = Path(__file__).parents[2] / "docs/how-to/choose-a-vllm-version.md"
ALONE = Served([[5, 6, 7, 8]], [[]])


@pytest.mark.parametrize(
    ("answers", "accepted", "kind"),
    [
        ([[5, 6, 7, 8]], [[2, 0]], EQUAL),
        ([[5, 6, 7, 8]], [[0, 2]], OTHER),  # the same sum
        ([[5, 6, 7, 8]], [[1, 0]], OTHER),
        ([[5, 6, 7, 9]], [[2, 0]], OTHER),
    ],
)
def test_only_the_same_answers_and_passes_are_equal(
    answers: list[list[int]], accepted: list[list[int]], kind: str
) -> None:
    trial = Trial(Path("draft"), "explicit", Served([[5, 6, 7, 8]], [[2, 0]]))

    assert judge(Served(answers, accepted), ALONE, trial).kind == kind


def test_requirements_lose_extras_builds_and_pictures(tmp_path: Path) -> None:
    wheel = tmp_path / "engine.whl"
    needs = [
        'torch==2.11.0+cpu; platform_machine == "x86_64"',
        "torchvision",
        'torchaudio; platform_machine != "s390x"',
        "numpy",
        'boto3; extra == "s3"',
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = ["Name: engine", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr("engine-1.dist-info/METADATA", "\n".join(lines))

    found = read_requirements(wheel)

    assert found == ['torch==2.11.0; platform_machine == "x86_64"', "numpy"]


def test_the_table_says_what_a_version_made_of_each_export() -> None:
    results = {
        "1.0": {"a": Outcome(REFUSED, "KeyError: 'x'"), "b": Outcome(NOT_RUN)},
        "2.0": {"a": Outcome(EQUAL, "1.7"), "b": Outcome(OTHER, "1.2 for 1.7")},
    }

    lines = table(results).splitlines()

    assert lines == [
        "| Draft | 1.0 | 2.0 |",
        "| --- | --- | --- |",
        "| a | refused | equal |",
        "| b | not run | other counts: 1.2 for 1.7 |",
        "",
        "- 1.0, a: `KeyError: 'x'`",
    ]


PLAIN = Eagle3Config(
    arch="llama",
    hidden_size=24,
    target_hidden_size=24,
    intermediate_size=40,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=64,
    vocab_size=37,
    draft_vocab_size=19,
    target_layer_ids=(3, 5, 7),
    norm_before_residual=True,
    norm_before_fc=False,
    fc_norm=False,
    norm_output=False,
    ttt_steps=3,
    verifier_name_or_path="verifier",
    verifier_architectures=("LlamaForCausalLM",),
)


@pytest.mark.parametrize(
    ("row", "config"),
    [
        ("default", PLAIN),
        ("2 layers", replace(PLAIN, num_layers=2)),
        ("qwen3 layers", replace(PLAIN, arch="qwen3")),
        ("`fc_norm`", replace(PLAIN, fc_norm=True)),
        ("`norm_before_fc`", replace(PLAIN, norm_before_fc=True)),
        ("`norm_output`, `norm_before_residual` off", replace(PLAIN, norm_output=True)),
        ("`norm_before_residual` off", replace(PLAIN, norm_before_residual=False)),
        ("verifier layers 1, 3, 5, 6", replace(PLAIN, target_layer_ids=(1, 3, 5, 6))),
    ],
)
def test_the_advice_is_the_oldest_version_that_the_page_calls_equal(
    row: str, config: Eagle3Config
) -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    versions = lines[0][1:]
    outcomes = next(line[1:] for line in lines if line[0] == row)

    oldest = versions[outcomes.index("equal")]

    advice = Vllm().advise(config)
    assert advice is not None
    assert advice.oldest == oldest
    assert (OLDEST_TRIED in versions, versions[-1]) == (True, NEWEST_TRIED)
