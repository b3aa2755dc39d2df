"""Each cause of a low acceptance length is planted, and named first."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators_cli.core.conversations.prompts import RawPrompt
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import TrainedDraft, read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.evaluation.diagnosis import (
    Diagnosis,
    Diagnostician,
    is_suspicious,
    neighbours,
)
from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.evaluate import evaluate
from speculators_cli.core.evaluation.measurement import Work, answer_alone, measure
from speculators_cli.core.evaluation.prompt_formats import try_formats
from speculators_cli.core.evaluation.questions import Question
from speculators_cli.core.evaluation.verifier import LoadedVerifier, load_verifier
from speculators_cli.core.models.verifier import read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.evaluate import EvaluateSettings
from tests.embedded_draft import train_draft
from tests.generated_samples import generate_samples, sample_files
from tests.recorded_progress import RecordedProgress
from tests.spread_verifier import write_spread_verifier

QUIET = SilentProgress()
LAYER_IDS = (2, 5, 8)  # the last one is that of the final norm
LAYERS = tuple(range(1, 9))
NUM_DRAFT_TOKENS = 3
TEXTS = read_prompts()[:24]


def load(folder: Path = VERIFIER_DIR) -> LoadedVerifier:
    return load_verifier(VerifierFiles(str(folder)), LAYERS, dtype=torch.float32)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedDraft, TrainedDraft]:
    """A draft, and one that was trained on states of the last layer after the final norm."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "normed")]
    (folders[1] / "verifier").mkdir()
    verifiers = (VERIFIER_DIR, write_spread_verifier(folders[1] / "verifier"))
    for folder, verifier in zip(folders, verifiers, strict=True):
        copy_tokenizer(verifier)
        generate_samples(
            folder / "data", TEXTS, max_new_tokens=24, layer_ids=LAYER_IDS, verifier=verifier
        )
    model: Any = load(folder=verifiers[1]).rows
    norm = model._model.parts.norm
    for file in sample_files(folders[1] / "data"):
        sample = torch.load(file, weights_only=True)
        with torch.no_grad():
            sample["hidden_states"][2] = norm(sample["hidden_states"][2])
        torch.save(sample, file)
    names = [{"verifier_name_or_path": str(verifier)} for verifier in verifiers]
    plain, normed = (
        read_draft(str(train_draft(folder, epochs=epochs, draft={**of, "full_vocab": True})))
        for folder, of, epochs in zip(folders, names, (10, 4), strict=True)
    )
    return plain, normed


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder / name).exists():
            shutil.copy(VERIFIER_DIR / name, folder / name)


@cache
def answer(folder: Path) -> tuple[LoadedVerifier, list[tuple[Sequence[int], Answer]]]:
    """A verifier, and its answers to the prompts that drafts were trained on."""
    verifier = load(folder=folder)
    prompts = [Prompt(verifier.encode(text), 0) for text in TEXTS]
    answers = answer_alone(verifier, Work(prompts, Sampling(24), 24), QUIET).answers
    return verifier, [(prompt.ids, x) for prompt, x in zip(prompts, answers, strict=True)]


def diagnose(source: TrainedDraft) -> Diagnosis:
    files = VerifierFiles(source.config.verifier_name_or_path)
    config = read_verifier_config(files, trust_remote_code=False)
    verifier, pairs = answer(files.folder)
    found = Diagnostician(
        source, verifier, LAYERS, config, num_draft_tokens=NUM_DRAFT_TOKENS, seed=0
    ).diagnose(pairs)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def right(drafts: tuple[TrainedDraft, TrainedDraft]) -> Diagnosis:
    """Of the draft as it was trained."""
    return diagnose(drafts[0])


def test_layers_beside_those_of_a_draft_are_hooked() -> None:
    assert neighbours((2, 5, 8), 8) == {1, 2, 3, 4, 5, 6, 7, 8}
    assert neighbours((0, 4), 8) == {0, 1, 3, 4, 5}


def test_nothing_is_found_where_nothing_is_wrong(right: Diagnosis) -> None:
    assert right.found == ()
    assert {cause.name for cause in right.causes} >= {"layer ids", "final norm", "norm_output"}
    assert right.acceptance_length > 1.8


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("norm_before_residual", {"norm_before_residual": False}),
        ("rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("layer ids", {"target_layer_ids": (1, 4, 7)}),
    ],
)
def test_a_planted_value_of_the_config_is_named_first(
    drafts: tuple[TrainedDraft, TrainedDraft],
    right: Diagnosis,
    name: str,
    changes: dict[str, Any],
) -> None:
    source = replace(drafts[0], config=replace(drafts[0].config, **changes))

    found = diagnose(source)

    assert found.causes[0].name == name
    assert found.causes[0].is_real
    # The change takes back what was planted.
    assert found.causes[0].acceptance_length == pytest.approx(right.acceptance_length, abs=1e-6)
    assert found.acceptance_length < right.acceptance_length


def test_the_embedding_of_another_verifier_is_named_first(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    own = drafts[0].embedding
    assert own is not None
    source = replace(drafts[0], embedding=own.roll(1, 0))

    found = diagnose(source)

    assert found.causes[0].name == "embedding"
    assert found.causes[0].gain > 0.2


def test_states_after_the_final_norm_are_named_first(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    found = diagnose(drafts[1])

    assert found.causes[0].name == "final norm"
    assert found.causes[0].is_real


def test_a_draft_vocabulary_without_the_tokens_of_the_domain_is_named_first(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    full = drafts[0]
    t2d = torch.arange(full.vocab_map.vocab_size) % 3 > 0
    kept = t2d.nonzero()[:, 0]
    vocab_map = type(full.vocab_map)(kept - torch.arange(len(kept)), t2d)
    source = replace(
        full,
        config=replace(full.config, draft_vocab_size=len(kept)),
        weights={**full.weights, "lm_head.weight": full.weights["lm_head.weight"][kept]},
        vocab_map=vocab_map,
    )

    found = diagnose(source)

    assert found.causes[0].name == "draft vocabulary"
    assert found.causes[0].is_real


def test_chains_beyond_the_trained_length_are_compared(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    checkpoint = drafts[0].checkpoint
    assert checkpoint is not None
    settings = {**checkpoint.state.settings, "data": {"total_seq_len": 40}}
    state = replace(checkpoint.state, settings=settings)
    source = replace(drafts[0], checkpoint=replace(checkpoint, state=state))

    (cause,) = [x for x in diagnose(source).causes if x.name == "context length"]

    assert "within 40 tokens" in cause.change


def test_a_chat_template_unlike_training_is_named(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    verifier = load()
    verifier.rows.select_layers(LAYER_IDS)
    verifier.tokens.tokenizer.chat_template = (
        "{% for m in messages %}class X: {{ m.content.upper() }} # end{% endfor %}"
    )
    ids = [verifier.encode(f"class X: {text.upper()} # end") for text in TEXTS]
    questions = [Question(i, tuple(x), None, RawPrompt(i, TEXTS[i])) for i, x in enumerate(ids)]
    work = Work([Prompt(x, 0) for x in ids], Sampling(24), 12)
    drafter = drafts[0].build_drafter(verifier.embedding, num_draft_tokens=NUM_DRAFT_TOKENS)
    own = answer_alone(verifier, work, QUIET).answers
    measured = measure(verifier, drafter, work, own, progress=QUIET)

    causes = list(
        try_formats(verifier, drafter, questions, measured.answers, work, seed=0, progress=QUIET)
    )

    first = max(causes, key=lambda cause: cause.gain)
    assert first.change == "without the chat template"
    assert first.is_real
    verifier.tokens.tokenizer.chat_template = None
    assert not list(
        try_formats(verifier, drafter, questions, measured.answers, work, seed=0, progress=QUIET)
    )


def test_a_length_far_below_the_simulated_one_is_suspicious(
    drafts: tuple[TrainedDraft, TrainedDraft],
) -> None:
    checkpoint = drafts[0].checkpoint
    assert checkpoint is not None
    metrics = {"acceptance_length": 3.0}
    state = replace(checkpoint.state, metrics=metrics)
    source = replace(drafts[0], checkpoint=replace(checkpoint, state=state))
    lengths: Any = [type("Measured", (), {"acceptance_length": x}) for x in (1.9, 2.1)]

    assert [is_suspicious(source, measured) for measured in lengths] == [True, False]
    assert not is_suspicious(replace(source, checkpoint=None), lengths[0])


def write_verifier(folder: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """The embedded verifier, with its matrices changed."""
    folder.mkdir()
    for file in VERIFIER_DIR.iterdir():
        shutil.copy(file, folder / file.name)
    tensors = load_file(VERIFIER_DIR / "model.safetensors")
    changed = {key: change(x.float()) if x.dim() == 2 else x for key, x in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def round_to_4_bits(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=-1, keepdim=True) / 7
    return (weight / scale).round() * scale


def evaluate_with(
    draft: TrainedDraft, verifier: Path, folder: Path, progress: RecordedProgress
) -> Diagnosis:
    prompts = folder / "prompts.jsonl"
    rows = [json.dumps({"prompt": text}) for text in TEXTS]
    prompts.write_text("\n".join(rows), "utf-8")
    settings: dict[str, Any] = {
        "source": {"checkpoint": draft.name, "verifier_name_or_path": str(verifier)},
        "prompts": {"prompts": str(prompts)},
        "drafting": {"max_new_tokens": 24},
        "engine": {"device": "cpu"},
        "result": {"diagnose": True},
    }
    report = evaluate(EvaluateSettings.model_validate(settings), progress=progress)
    assert report.diagnosis is not None
    return report.diagnosis


@pytest.mark.parametrize(
    ("name", "change"),
    [("quantized verifier", round_to_4_bits), ("other verifier", lambda x: x.roll(1, 0))],
)
def test_another_verifier_than_that_of_the_training_is_named_first(
    drafts: tuple[TrainedDraft, TrainedDraft],
    tmp_path: Path,
    name: str,
    change: Callable[[Tensor], Tensor],
) -> None:
    verifier = write_verifier(tmp_path / "changed", change)

    found = evaluate_with(drafts[0], verifier, tmp_path, RecordedProgress())

    assert found.causes[0].name == name
    assert found.causes[0].is_real
    assert str(VERIFIER_DIR) in found.causes[0].change
    # With the verifier of its training, the draft is as good as ever.
    assert found.causes[0].acceptance_length > 1.8


def test_the_verifier_of_the_training_is_not_tried_where_it_is_the_one_used(
    drafts: tuple[TrainedDraft, TrainedDraft], tmp_path: Path
) -> None:
    found = evaluate_with(drafts[0], VERIFIER_DIR, tmp_path, RecordedProgress())

    assert not {"quantized verifier", "other verifier"} & {cause.name for cause in found.causes}
    assert found.found == ()


def test_a_verifier_of_the_training_that_is_gone_is_reported(
    drafts: tuple[TrainedDraft, TrainedDraft], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "draft"
    shutil.copytree(drafts[0].name, checkpoint)
    shutil.rmtree(checkpoint / "trainer")
    config = json.loads((checkpoint / "config.json").read_text())
    gone = str(tmp_path / "gone")
    config["speculators_config"]["verifier"]["name_or_path"] = gone
    (checkpoint / "config.json").write_text(json.dumps(config))
    progress = RecordedProgress()

    found = evaluate_with(read_draft(str(checkpoint)), VERIFIER_DIR, tmp_path, progress)

    assert len(found.causes) > 3
    assert any("is not tried" in warning and gone in warning for warning in progress.warnings)
