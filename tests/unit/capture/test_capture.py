"""Captured samples against transformers' own hidden states."""

import json
from pathlib import Path

import torch

from speculators_cli.core.capture.capture import capture
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.models.verifier_model import VerifierModel
from speculators_cli.core.progress import SilentProgress
from tests.cache_free_draft_and_verify import load_verifier

LAYER_IDS = (2, 4, 5)


def test_samples_hold_transformers_own_hidden_states(tmp_path: Path) -> None:
    verifier = VerifierModel(str(VERIFIER_DIR), LAYER_IDS, dtype=torch.float32)
    prompts = [verifier.encode(text) for text in read_prompts()[:3]]

    report = capture(
        verifier,
        prompts,
        tmp_path,
        verifier_name="some/verifier",
        max_new_tokens=16,
        progress=SilentProgress(),
    )

    plain = load_verifier(VERIFIER_DIR)
    samples = [FORMATS["v1"].read_sample(tmp_path / f"data_{i}.pt") for i in range(3)]
    for prompt, sample in zip(prompts, samples, strict=True):
        with torch.no_grad():
            out = plain(sample.input_ids[None], output_hidden_states=True, use_cache=False)
            last = sample.last_hidden_states[:]
            normed = plain.model.norm(last)
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert sample.loss_mask.tolist() == [i >= len(prompt) for i in range(sample.num_tokens)]
        assert not sample.is_normed
        for layer_id, states in zip(LAYER_IDS, sample.aux_hidden_states, strict=True):
            assert torch.equal(states[:], out.hidden_states[layer_id][0])
        # transformers' last entry is after the final norm, ours before it.
        assert torch.equal(normed, out.hidden_states[-1][0])
        assert not torch.equal(last, normed)
    assert report.num_samples == 3
    assert report.num_tokens == sum(sample.num_tokens for sample in samples)
    assert report.num_supervised_tokens == sum(int(s.loss_mask.sum()) for s in samples) > 0
    written = json.loads((tmp_path / "data_config.json").read_text())
    assert written["hidden_states"] == {
        "layer_ids": list(LAYER_IDS),
        "layer_ids_convention": "vllm",
        "layer_ids_assumed": False,
    }
