"""Capture v1 samples: a verifier's answers to prompts, with its hidden states."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.models.verifier_model import VerifierModel
from speculators_cli.core.progress import Progress

BATCH = 64  # prompts per batch


@dataclass(frozen=True)
class CaptureReport:
    """Counts of a capture."""

    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    duration_seconds: float


def capture(
    verifier: VerifierModel,
    prompts: Sequence[Sequence[int]],
    output_dir: Path,
    *,
    verifier_name: str,
    max_new_tokens: int,
    progress: Progress,
) -> CaptureReport:
    """Answer prompts greedily and write one v1 sample each, with the answer supervised.

    Args:
        verifier: Generates the answers and computes the hidden states.
        prompts: Token ids of each prompt.
        output_dir: `data_{i}.pt` and `data_config.json` are written here.
        verifier_name: Recorded in `data_config.json`.
        max_new_tokens: Maximum length of an answer.
        progress: Reports progress.
    """
    started_at = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_data_config(output_dir, verifier=verifier_name, layer_ids=verifier.layer_ids)
    # Batches are sorted by length for less padding; files are numbered by position in `prompts`.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_tokens = num_supervised = 0
    with progress.task("Capturing", len(prompts)) as task:
        for start in range(0, len(order), BATCH):
            ids = order[start : start + BATCH]
            answers = verifier.answer([prompts[i] for i in ids], max_new_tokens)
            for i, answer in zip(ids, answers, strict=True):
                sample = capture_sample(verifier, prompts[i], answer)
                v1.write_sample(sample, output_dir / f"data_{i}.pt")
                num_tokens += sample.num_tokens
                num_supervised += len(answer)
                task.advance()
    return CaptureReport(len(prompts), num_tokens, num_supervised, time.perf_counter() - started_at)


def capture_sample(verifier: VerifierModel, prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """Build the sample of one conversation with one forward pass, without padding."""
    input_ids = torch.tensor([*prompt, *answer])
    out = verifier.run(input_ids.to(verifier.model.device))
    return Sample(
        input_ids=input_ids,
        loss_mask=torch.arange(len(input_ids)) >= len(prompt),
        aux_hidden_states=tuple(states.cpu() for states in out.aux_hidden_states),
        last_hidden_states=out.last_hidden_states.cpu(),
        is_normed=False,
    )
