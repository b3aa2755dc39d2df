"""The cost model of P-EAGLE, against steps measured on an H200."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from speculators_cli.core.algorithms.cost import GPUS
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.cost import PEagleCost
from speculators_cli.core.bench.synthetic import document_lengths
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from tests.tiny_drafts import shaped_config

# ms/step and GiB of `speculators bench --algorithm peagle --steps 8` with these settings, torch
# 2.11: the shape of Llama-3.1-8B, 8,192 tokens, 60% of them supervised, four layers. When they were
# measured, the verifier's whole LM head was on the GPU, and gated activations were kept.
MEASURED: list[tuple[dict[str, Any], float, float]] = [
    ({"down_sample_ratio": 1.0}, 308.8, 33.09),
    ({}, 208.6, 27.27),
    ({"num_anchors": 1024}, 142.7, 25.11),
    ({"ttt_steps": 8, "down_sample_ratio": 1.0}, 480.9, 41.96),
    ({"ttt_steps": 8}, 262.1, 29.50),
]


@pytest.mark.parametrize(("given", "ms", "gib"), MEASURED)
def test_time_and_memory_are_within_5_percent_of_what_was_measured(
    given: dict[str, Any], ms: float, gib: float
) -> None:
    settings = PEagleSettings.model_validate({"ttt_steps": 5} | given)
    eagle = shaped_config("llama-3.1-8b", num_layers=4, ttt_steps=settings.ttt_steps)
    shared = {field.name: getattr(eagle, field.name) for field in fields(eagle)}
    config, cost = PEagleConfig(**shared, mask_token_id=1), PEagleCost()
    lengths = document_lengths(8192, None, torch.Generator().manual_seed(0))
    # Prompt, answer, prompt, answer.
    turns = [n for length in lengths for n in (length - length // 2, length // 2)]
    mask = torch.cat([torch.arange(n) >= n - round(0.6 * n) for n in turns])

    work = cost.count_work(config, settings, mask, lengths)
    flops = work.flops + work.other_flops
    seconds = cost.estimate_seconds(flops, cost.count_trained(config, settings), GPUS["H200"])
    memory = cost.estimate_memory(config, settings, [work], total_seq_len=8192, has_whole_head=True)
    passes = cost.count_passes(config, settings, work.num_active)
    gated = 2 * passes * config.num_layers * config.intermediate_size

    assert 1e3 * seconds == pytest.approx(ms, rel=0.05)
    assert (sum(memory.values()) + gated) / 2**30 == pytest.approx(gib, rel=0.05)
