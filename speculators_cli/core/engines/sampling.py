"""Choosing the tokens of answers: greedily, or at random with a stream of numbers per answer."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from speculators_cli.core.engines.engine import Prompt, Sampling

SEED_BYTES = 7  # vLLM takes seeds below 2^63


def seed_of(seed: int, index: int, turn: int = 0) -> int:
    """Return the seed of one answer, which depends on nothing else."""
    digest = sha256(f"{seed} {index} {turn}".encode()).digest()
    return int.from_bytes(digest[:SEED_BYTES], "big")


def uniforms_of(prompts: Sequence[Prompt], max_new_tokens: int) -> Tensor:
    """Return the random numbers of each answer; [prompts, max_new_tokens], float64 in [0, 1).

    They depend on the prompt's seed only, so an answer does not depend on its batch.
    """
    rows = [np.random.Generator(np.random.Philox(prompt.seed)) for prompt in prompts]
    return torch.from_numpy(np.stack([row.random(max_new_tokens) for row in rows]))


def choose_tokens(
    logits: Tensor,  # [rows, vocab]
    uniforms: Tensor,  # [rows], float64 in [0, 1)
    sampling: Sampling,
) -> Tensor:
    """Choose a token per row from `softmax(logits / temperature)`; [rows], int64.

    With `top_p` below 1, only the most probable tokens count, as many as reach that mass. The
    distribution is inverted at `uniforms`, in float64, so that no probability is lost in the sum.
    """
    values, ids = logits.double().sort(dim=-1, descending=True)
    probabilities = (values / sampling.temperature).softmax(-1)
    mass = probabilities.cumsum(-1)
    # Of the tokens before it, the mass is still below top_p: the first one is always kept.
    is_kept = mass - probabilities < sampling.top_p
    kept_mass = (probabilities * is_kept).sum(-1, keepdim=True)
    place = (mass <= uniforms[:, None] * kept_mass).sum(-1, keepdim=True)
    last_kept = is_kept.sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(place, last_kept))[:, 0]


class SamplingProcessor:
    """Logits processor of transformers that leaves one token: `generate` stays greedy."""

    def __init__(self, prompts: Sequence[Prompt], sampling: Sampling, device: torch.device) -> None:
        self._uniforms = uniforms_of(prompts, sampling.max_new_tokens).to(device)
        self._sampling = sampling
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Return scores that are finite at the chosen token only."""
        tokens = choose_tokens(scores, self._uniforms[:, self._step], self._sampling)
        self._step += 1
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(-1, tokens[:, None], 0.0)
