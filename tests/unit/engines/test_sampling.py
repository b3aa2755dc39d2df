"""Tokens of answers are chosen from the distribution that the settings describe."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.sampling import (
    SamplingProcessor,
    choose_tokens,
    uniforms_of,
)

NUM_DRAWS = 20_000
# Chi-square of a right distribution is above these in one of 10,000 seeds, by degrees of freedom.
CRITICAL = {4: 23.5, 5: 25.7, 6: 27.9, 10: 35.6}


def random_logits(vocab: int = 11) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution by definition: the fewest most probable tokens that reach top_p."""
    p = (logits.double() / temperature).softmax(-1)
    kept = torch.zeros_like(p)
    mass = 0.0
    for token in p.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept[token] = p[token]
        mass += float(p[token])
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.8])
def test_tokens_have_the_distribution_of_the_nucleus(temperature: float, top_p: float) -> None:
    logits = random_logits()
    sampling = Sampling(1, temperature, top_p)
    uniforms = torch.rand(
        NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )

    tokens = choose_tokens(logits.expand(NUM_DRAWS, -1), uniforms, sampling)

    expected = nucleus(logits, temperature, top_p) * NUM_DRAWS
    counts = tokens.bincount(minlength=len(logits)).double()
    is_kept = expected > 0
    assert counts[~is_kept].sum() == 0
    # The statistic needs some draws of each token.
    is_counted = expected >= 5
    chi_square = ((counts - expected) ** 2 / expected)[is_counted].sum()
    num_free = int(is_counted.sum()) - 1
    assert chi_square < min(x for df, x in CRITICAL.items() if df >= num_free)
    assert counts[is_kept].sum() == NUM_DRAWS
    assert is_kept.all() == (top_p == 1.0)


def test_a_lower_temperature_prefers_the_most_probable_token() -> None:
    logits = random_logits()
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]

    shares = [
        float(
            (choose_tokens(logits.expand(1000, -1), uniforms, Sampling(1, t)) == logits.argmax())
            .float()
            .mean()
        )
        for t in (0.1, 0.5, 1.0, 3.0)
    ]

    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 2 * shares[-1]


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1.0])
def test_the_ends_of_the_unit_interval_are_the_ends_of_the_nucleus(top_p: float) -> None:
    logits = random_logits().repeat(2, 1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)

    first, last = choose_tokens(logits, uniforms, Sampling(1, 1.0, top_p)).tolist()

    expected = nucleus(logits[0], 1.0, top_p)
    kept = [t for t in expected.argsort(descending=True).tolist() if expected[t] > 0]
    assert (first, last) == (kept[0], kept[-1])


def test_half_precision_logits_and_ruled_out_tokens_are_taken() -> None:
    logits = random_logits().bfloat16().repeat(50, 1)
    logits[:, 4] = float("-inf")
    uniforms = torch.linspace(0, 1, 51, dtype=torch.float64)[:-1]

    tokens = choose_tokens(logits, uniforms, Sampling(1, 1.5))

    assert 4 not in tokens
    assert len(tokens.unique()) > 3


def test_random_numbers_are_of_the_seed_of_each_prompt() -> None:
    prompts = [Prompt([1], seed) for seed in (7, 2**62, 7)]

    uniforms = uniforms_of(prompts, 100)

    assert uniforms.shape == (3, 100)
    assert uniforms.dtype == torch.float64
    assert 0 <= uniforms.min() < uniforms.max() < 1
    assert torch.equal(uniforms[0], uniforms[2])
    assert not (uniforms[0] == uniforms[1]).any()
    assert torch.equal(uniforms[1:2], uniforms_of(prompts[1:2], 100))


def test_the_processor_leaves_the_chosen_token_of_each_step() -> None:
    prompts, sampling = [Prompt([1], 5), Prompt([2], 6)], Sampling(3, 1.1)
    processor = SamplingProcessor(prompts, sampling, torch.device("cpu"))
    uniforms = uniforms_of(prompts, 3)
    scores = random_logits().repeat(2, 1)

    chosen = [processor(torch.empty(0), scores) for _ in range(3)]

    for step, left in enumerate(chosen):
        assert left.isfinite().sum(-1).tolist() == [1, 1]
        assert torch.equal(left.argmax(-1), choose_tokens(scores, uniforms[:, step], sampling))
