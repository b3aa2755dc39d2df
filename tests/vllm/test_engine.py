"""Exports in vLLM's own engine: the verifier's output, and the very counts of draft-and-verify.

docs/contributing.md says how to install the engine; `VLLM_PYTHON` names its interpreter.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.vllm.exported_drafts import (
    BLOCK_VARIANTS,
    MASK_VARIANTS,
    RESIDUAL_OFF,
    VARIANTS,
    Questions,
    Served,
    Variant,
    ask_demo,
    export,
    train,
    write_eagle,
)

pytestmark = pytest.mark.vllm

QUESTIONS = (
    "Explain gravity in simple terms.",
    "Write a short story about penguins.",
    "List five facts about the Moon.",
    "Write a Python function that adds two numbers.",
    "Why does sleep matter?",
    "What is the history of tea?",
)


@dataclass(frozen=True)
class Bench:
    """The engine, and the questions it is asked."""

    questions: Questions
    alone: Served  # without a draft

    def serve(self, draft: Path, way: str) -> Served:
        return self.questions.serve(os.environ["VLLM_PYTHON"], draft, way)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


def open_bench(questions: Questions) -> Bench:
    return Bench(questions, questions.serve(os.environ["VLLM_PYTHON"], None, "alone"))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return open_bench(ask_demo())


Check = Callable[[Bench, Path, str, str], None]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Serve an export, compare everything, write a row of the table in the docs."""

    def compare(bench: Bench, draft: Path, way: str, name: str) -> None:
        served = bench.serve(draft, way)

        expected = bench.questions.draft_and_verify(draft)
        passes, accepted, length = served.row()
        with capsys.disabled():
            counts = " | ".join(map(str, [passes, *accepted]))
            sys.stdout.write(f"\n| {name} | {way} | {counts} | {length:.3f} |\n")
        assert served.answers == bench.alone.answers
        assert served.answers == expected.answers
        assert served.accepted == expected.accepted  # pass by pass
        assert served.drafted == expected.drafted  # token by token, those refused as well
        # A draft that is never accepted would agree too.
        assert sum(accepted) > passes / 4

    return compare


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_counts_what_we_count(
    bench: Bench, folder: Path, name: str, check: Check
) -> None:
    draft = export(train(VARIANTS[name], folder), folder / f"served {name}")

    check(bench, draft, "explicit", name)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.misread])
def test_a_misread_config_would_be_seen(folder: Path, name: str) -> None:
    draft = export(train(VARIANTS[name], folder), folder / f"served {name}")
    questions = ask_demo()

    own = questions.draft_and_verify(draft)
    misread = questions.draft_and_verify(draft, **VARIANTS[name].misread)

    assert own.answers == misread.answers
    assert own.drafted != misread.drafted


@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_the_engine_fills_in_the_blocks_that_we_do(
    bench: Bench, folder: Path, name: str, check: Check
) -> None:
    draft = export(train(BLOCK_VARIANTS[name], folder), folder / f"blocks {name}")

    check(bench, draft, "explicit", f"DFlash, {name}")


@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_a_misread_block_config_would_be_seen(folder: Path, name: str) -> None:
    draft = export(train(BLOCK_VARIANTS[name], folder), folder / f"blocks {name}")
    questions = ask_demo()

    own = questions.draft_and_verify(draft)
    misread = questions.draft_and_verify(draft, **BLOCK_VARIANTS[name].misread)

    assert own.answers == misread.answers
    assert own.drafted != misread.drafted


@pytest.mark.parametrize("name", MASK_VARIANTS)
def test_the_engine_drafts_from_the_masks_that_we_do(
    bench: Bench, folder: Path, name: str, check: Check
) -> None:
    draft = export(train(MASK_VARIANTS[name], folder), folder / f"masks {name}")

    check(bench, draft, "explicit", f"P-EAGLE, {name}")


@pytest.mark.parametrize(
    "name", [name for name, variant in MASK_VARIANTS.items() if variant.misread]
)
def test_a_misread_mask_config_would_be_seen(folder: Path, name: str) -> None:
    draft = export(train(MASK_VARIANTS[name], folder), folder / f"masks {name}")
    questions = ask_demo()

    own = questions.draft_and_verify(draft)
    misread = questions.draft_and_verify(draft, **MASK_VARIANTS[name].misread)

    assert own.answers == misread.answers
    assert own.drafted != misread.drafted


def test_the_folder_of_a_mask_draft_alone_is_enough(
    bench: Bench, folder: Path, check: Check
) -> None:
    variant = MASK_VARIANTS["1 layer"]
    draft = export(train(variant, folder), folder / "masks alone")

    check(bench, draft, "folder", "P-EAGLE, folder only")


@pytest.mark.parametrize("flags", [[], ["--without-embeddings"]])
def test_the_folder_alone_is_enough(
    bench: Bench, folder: Path, flags: list[str], check: Check
) -> None:
    out = folder / "-".join(["alone", *flags])
    draft = export(train(Variant(), folder), out, "--max-shard-size", "1MB", *flags)

    check(bench, draft, "folder", " ".join(["shards", *flags]))


@pytest.mark.parametrize("target", ["vllm", "eagle"])
def test_an_eagle_checkpoint_is_served(
    bench: Bench, folder: Path, target: str, check: Check
) -> None:
    source = write_eagle(train(RESIDUAL_OFF, folder), folder / f"eagle-{target}")
    twin = export(source, folder / "from-eagle-vllm")

    if target == "vllm":
        check(bench, twin, "explicit", "from an EAGLE-3 checkpoint")
    else:
        served = bench.serve(export(source, folder / "plain", "--target", target), "explicit")
        assert served.answers == bench.alone.answers
        assert served.accepted == bench.questions.draft_and_verify(twin).accepted


@pytest.mark.skipif("VLLM_DRAFT" not in os.environ, reason="`VLLM_DRAFT` names no draft")
def test_a_draft_of_ones_own_is_served(tmp_path: Path, check: Check) -> None:
    source, out = os.environ["VLLM_DRAFT"], tmp_path / "served"
    assert run(["export", source, "--output-dir", str(out), "--dtype", "float32"]) == 0
    config = read_draft(str(out), Overrides(), flag="CHECKPOINT").config
    name = config.verifier_name_or_path
    tokenizer = load_tokenizer(VerifierFiles(name), trust_remote_code=False)
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )["input_ids"]
        )
        for text in QUESTIONS
    ]

    check(open_bench(Questions(name, prompts)), out, "folder", source)
