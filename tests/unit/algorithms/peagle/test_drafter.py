"""The drafter's pass over masks, against what training computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.algorithms.objective import shifted
from speculators_cli.core.algorithms.peagle.algorithm import PEagle
from speculators_cli.core.algorithms.peagle.drafter import PEagleDrafter
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from speculators_cli.core.data.batch import Batch
from tests.tiny_drafts import make_sample, pack
from tests.tiny_peagle import filled_peagle, make_peagle_config

WINDOWS: dict[str, dict[str, Any]] = {
    "full": {},
    "shorter-than-the-masks": {"sliding_window": 2},
    "longer": {"sliding_window": 7},
    "in-one-layer": {"sliding_window": 3, "full_attention_layers": (0,)},
}
# float32 keeps 24 bits; a logit is a sum of a few dozen terms after two layers.
RTOL = ATOL = 1e-4


@torch.no_grad()
def train_logits(draft: PEagleTraining, batch: Batch) -> Tensor:
    """Logits of each step at each position; [steps, seq_len, draft_vocab]."""
    tokens, hidden = batch.input_ids, draft.fuse(batch.aux_hidden_states)
    memories = [TTTMemory(batch.lengths, window) for window in draft.config.windows]
    logits = []
    for step in range(draft.config.ttt_steps):
        if step > 0:
            tokens, hidden = draft.next_inputs(shifted(batch.input_ids, step), hidden)
        normed, hidden = draft.step(tokens, hidden, batch.position_ids + step, memories)
        logits.append(draft.lm_head(normed))
    return torch.stack(logits)


def make_drafter(draft: PEagleTraining, *, num_draft_tokens: int) -> PEagleDrafter:
    drafter = PEagle().build_drafter(
        draft.config,
        dict(draft.named_parameters()),
        draft.embedding,
        draft.kept_ids,
        num_draft_tokens=num_draft_tokens,
    )
    assert isinstance(drafter, PEagleDrafter)
    return drafter


@pytest.mark.parametrize("windows", WINDOWS)
def test_each_draft_has_the_logits_of_training(windows: str, rng: torch.Generator) -> None:
    config = make_peagle_config(num_layers=2, ttt_steps=4, **WINDOWS[windows])
    draft = filled_peagle(config, rng).eval()
    batch = pack(make_sample(17, config, rng), total_seq_len=16)
    drafter = make_drafter(draft, num_draft_tokens=4)
    drafter.start(1, 20)
    expected = train_logits(draft, batch)

    # Passes that verify one to five positions; masks are written over.
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 12), (12, 13)):
        drafter.read(
            Verified(
                tokens=batch.input_ids[None, start:stop],
                aux=batch.aux_hidden_states[None, start:stop],
                firsts=(start,),
                counts=(stop - start,),
            )
        )

        with torch.inference_mode():
            logits = drafter.compute_logits()[0]

        torch.testing.assert_close(logits, expected[:, stop - 1], rtol=RTOL, atol=ATOL)
        tokens = drafter.propose()[0]
        assert torch.equal(tokens, draft.kept_ids[expected[:, stop - 1].argmax(-1)])


def test_rows_of_other_lengths_draft_as_each_alone(rng: torch.Generator) -> None:
    draft = filled_peagle(make_peagle_config(num_layers=2, ttt_steps=4), rng).eval()
    batch = pack(make_sample(12, draft.config, rng), total_seq_len=11)
    drafter = make_drafter(draft, num_draft_tokens=4)
    drafter.start(2, 20)
    expected = train_logits(draft, batch)

    for row, stop in enumerate((9, 5)):
        tokens, aux = batch.input_ids[None, :stop], batch.aux_hidden_states[None, :stop]
        drafter.read(Verified(tokens, aux, (0,), (stop,), row=row))
    proposed = drafter.propose()

    assert torch.equal(proposed[0], draft.kept_ids[expected[:, 8].argmax(-1)])
    assert torch.equal(proposed[1], draft.kept_ids[expected[:, 4].argmax(-1)])
    assert not torch.equal(proposed[0], proposed[1])


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 6])
def test_the_first_tokens_do_not_depend_on_how_many_are_drafted(
    num_draft_tokens: int, rng: torch.Generator
) -> None:
    draft = filled_peagle(make_peagle_config(ttt_steps=4), rng).eval()
    batch = pack(make_sample(8, draft.config, rng), total_seq_len=7)
    verified = Verified(batch.input_ids[None], batch.aux_hidden_states[None], (0,), (7,))
    found = []
    for count in (4, num_draft_tokens):
        drafter = make_drafter(draft, num_draft_tokens=count)
        drafter.start(1, 20)
        drafter.read(verified)
        found.append(drafter.propose()[0])

    trained, other = found
    assert len(other) == num_draft_tokens
    shared = min(len(trained), len(other))
    assert torch.equal(trained[:shared], other[:shared])
    assert PEagle().find_length_risk(draft.config, num_draft_tokens) is None
