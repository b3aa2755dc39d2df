"""Rows of sequences against transformers' own forward pass over each of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.engines.row_verifier import CachedRows, WholeRows, open_rows
from tests.tiny_families import ALONE, SERVED, VOCAB, build_model

LAYER_IDS = (1, 2, 4)


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(VOCAB, (num_tokens,), generator=generator).tolist()
    return drawn


def assert_same(found: Tensor, expected: Tensor) -> None:
    # Sums in another order, over four layers in float32, of values up to some tens.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def compute_alone(model: Any, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and aux hidden states of one sequence, by transformers alone."""
    before_norm: list[Tensor] = []
    parts = dict(model.get_decoder().named_children())
    norm = next(x for name, x in parts.items() if "norm" in name)
    hook = norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    out = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    hook.remove()
    states = [*out.hidden_states[:-1], before_norm[0]]
    return out.logits[0], torch.cat([states[k][0] for k in LAYER_IDS], dim=-1)


@pytest.mark.parametrize("family", [x for x in SERVED if x not in ALONE])
def test_rows_have_the_logits_and_states_of_each_sequence_alone(family: str) -> None:
    plain, rows = build_model(family), open_rows(build_model(family), LAYER_IDS, name=family)
    sequences = [random_tokens(n, seed=n) for n in (30, 21, 45)]

    rows.start(3, 64)
    begun = [rows.read(i, tokens[:-4]) for i, tokens in enumerate(sequences)]
    firsts = [len(tokens) - 4 for tokens in sequences]
    rows.extend(torch.tensor([random_tokens(4, seed=i) for i in range(3)]), firsts)  # refused
    found = rows.extend(torch.tensor([tokens[-4:] for tokens in sequences]), firsts)
    rows.keep([2, 0])
    kept = [sequences[2] + random_tokens(2, seed=7), sequences[0] + random_tokens(2, seed=8)]
    last = rows.extend(
        torch.tensor([tokens[-2:] for tokens in kept]), [len(tokens) - 2 for tokens in kept]
    )

    assert isinstance(rows, CachedRows)
    for row, tokens in enumerate(sequences):
        logits, aux = compute_alone(plain, tokens)
        assert_same(begun[row].logits[0, 0], logits[-5])
        assert_same(begun[row].aux[0], aux[:-4])
        assert_same(found.logits[row], logits[-4:])
        assert_same(found.aux[row], aux[-4:])
    for row, tokens in enumerate(kept):
        logits, aux = compute_alone(plain, tokens)
        assert_same(last.logits[row], logits[-2:])
        assert_same(last.aux[row], aux[-2:])


def test_a_family_that_carries_other_state_is_computed_whole() -> None:
    plain, rows = build_model("bamba"), open_rows(build_model("bamba"), LAYER_IDS, name="bamba")
    tokens = random_tokens(30, seed=0)

    rows.start(1, 64)
    rows.read(0, tokens[:-4])
    rows.extend(torch.tensor([random_tokens(4, seed=1)]), [26])  # refused
    found = rows.extend(torch.tensor([tokens[-4:]]), [26])

    logits, _ = compute_alone(plain, tokens)
    assert isinstance(rows, WholeRows)
    assert_same(found.logits[0], logits[-4:])
