"""Draft and verify against a loop without caches, and against transformers' own answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.evaluation.measurement import Work, answer_alone, measure
from speculators_cli.core.evaluation.verifier import LoadedVerifier, load_verifier
from speculators_cli.core.models.verifier import load_embedding
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from tests.cache_free_draft_and_verify import CacheFreeDraft, draft_and_verify, load_plain
from tests.embedded_draft import train_draft
from tests.generated_samples import generate_samples

MAX_NEW_TOKENS = 16
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "all-switches": {
        "draft": {"num_layers": 2, "draft_arch": "qwen3", "full_vocab": True},
        "eagle3": {"norm_before_residual": False, "fc_norm": True, "norm_output": True},
    },
    "norm-before-fc": {"draft": {"full_vocab": True}, "eagle3": {"norm_before_fc": True}},
}


@pytest.fixture(scope="module")
def verifier() -> LoadedVerifier:
    return load_verifier(VerifierFiles(str(VERIFIER_DIR)), (2, 4, 5), dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(verifier: LoadedVerifier) -> list[list[int]]:
    return [verifier.encode(text) for text in read_prompts()[:6]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the very prompts that are drafted afterwards."""
    folder = tmp_path_factory.mktemp("captured") / "data"
    generate_samples(folder, read_prompts()[:6], max_new_tokens=MAX_NEW_TOKENS)
    return folder


def load(checkpoint_dir: Path) -> Drafter:
    source = read_draft(str(checkpoint_dir), Overrides(), flag="CHECKPOINT")
    files = VerifierFiles(str(VERIFIER_DIR))
    embedding = load_embedding(files)
    return source.build_drafter(embedding, num_draft_tokens=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_a_loop_without_caches(
    verifier: LoadedVerifier,
    prompts: list[list[int]],
    data_dir: Path,
    tmp_path: Path,
    variant: str,
) -> None:
    (tmp_path / "data").symlink_to(data_dir)
    checkpoint_dir = train_draft(tmp_path, epochs=8, **VARIANTS[variant])

    # Fewer rows than prompts: rows of unequal lengths go to the next prompt, or are dropped.
    work = Work([Prompt(ids, 0) for ids in prompts], Sampling(MAX_NEW_TOKENS), 3)
    own = answer_alone(verifier, work, SilentProgress()).answers
    report = measure(verifier, load(checkpoint_dir), work, own, progress=SilentProgress())

    plain, draft = load_plain(VERIFIER_DIR), CacheFreeDraft(checkpoint_dir)
    expected = [
        draft_and_verify(plain, draft, prompt, num_draft_tokens=3, max_new_tokens=MAX_NEW_TOKENS)
        for prompt in prompts
    ]
    assert [answer.num_accepted for answer in report.answers] == [x.num_accepted for x in expected]
    assert [answer.tokens for answer in report.answers] == [x.tokens for x in expected]
    assert report.is_lossless
    assert {0, 1} <= {count for x in expected for count in x.num_accepted}
    passes = [count for x in expected for count in x.num_accepted]
    assert report.acceptance_length == pytest.approx(1 + sum(passes) / len(passes))
    assert report.acceptance_rates[1] == sum(count >= 2 for count in passes) / len(passes)


def test_answers_are_those_of_transformers(
    verifier: LoadedVerifier, prompts: list[list[int]]
) -> None:
    plain = load_plain(VERIFIER_DIR)

    work = Work([Prompt(ids, 0) for ids in prompts[:5]], Sampling(MAX_NEW_TOKENS), 2)
    answers = answer_alone(verifier, work, SilentProgress()).answers

    for prompt, answer in zip(prompts[:5], answers, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = plain.generate(
            ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        assert tuple(out[0, len(prompt) :].tolist()) == answer.tokens
