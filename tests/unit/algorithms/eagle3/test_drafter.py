"""The drafter's KV caches, against what training computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.algorithms.eagle3.drafter import Eagle3Drafter
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.objective import shifted
from speculators_cli.core.data.batch import Batch
from tests.tiny_drafts import filled_draft, make_config, make_sample, pack

WINDOWS: dict[str, dict[str, Any]] = {
    "full": {},
    "one": {"sliding_window": 1},
    "shorter-than-a-chain": {"sliding_window": 2},
    "as-long-as-a-chain": {"sliding_window": 4},
    "longer": {"sliding_window": 7},
    "longer-than-the-document": {"sliding_window": 99},
    "in-one-layer": {"sliding_window": 3, "full_attention_layers": (0,)},
}
# float32 keeps 24 bits; a logit is a sum of a few dozen terms after two layers.
RTOL = ATOL = 1e-4


class TrueDrafter(Eagle3Drafter):
    """Chooses the tokens of the document, as training reads them, and keeps its logits."""

    def __init__(self, draft: Eagle3Training, tokens: Tensor) -> None:
        super().__init__(draft, draft.kept_ids, draft.config.ttt_steps)
        self.tokens = tokens
        self.logits: list[Tensor] = []
        self.next = 0

    def _choose(self, normed: Tensor) -> Tensor:
        self.logits.append(self.draft.lm_head(normed[0]))
        self.next += 1
        at = min(self.next, len(self.tokens) - 1)
        return self.tokens[at : at + 1]


@torch.no_grad()
def train_logits(draft: Eagle3Training, batch: Batch) -> Tensor:
    """Logits of each TTT step at each position; [steps, seq_len, draft_vocab]."""
    hidden = draft.fuse(batch.aux_hidden_states)
    memories = [TTTMemory(batch.lengths, window) for window in draft.config.windows]
    logits = []
    for step in range(draft.config.ttt_steps):
        tokens, positions = shifted(batch.input_ids, step), batch.position_ids + step
        normed, hidden = draft.step(tokens, hidden, positions, memories)
        logits.append(draft.lm_head(normed))
    return torch.stack(logits)


@pytest.mark.parametrize("windows", WINDOWS)
def test_each_draft_has_the_logits_of_training(windows: str, rng: torch.Generator) -> None:
    config = make_config(num_layers=2, ttt_steps=4, **WINDOWS[windows])
    draft = filled_draft(config, rng, kept_ids=torch.arange(0, 37, 2)).eval()
    batch = pack(make_sample(17, config, rng), total_seq_len=16)
    drafter = TrueDrafter(draft, batch.input_ids)
    drafter.start(1, len(batch.input_ids) + config.ttt_steps)
    expected = train_logits(draft, batch)

    # Passes that verify one to five positions.
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 12), (12, 13)):
        drafter.logits, drafter.next = [], stop - 1
        drafter.read(
            Verified(
                tokens=batch.input_ids[None, start:stop],
                aux=batch.aux_hidden_states[None, start:stop],
                firsts=(start,),
                counts=(stop - start,),
            )
        )
        drafter.propose()
        chain = torch.stack(drafter.logits)
        torch.testing.assert_close(chain, expected[:, stop - 1], rtol=RTOL, atol=ATOL)


def test_a_window_changes_what_is_drafted(rng: torch.Generator) -> None:
    # Without this, the first test could compare two ways of ignoring it.
    batch = pack(make_sample(17, make_config(), rng), total_seq_len=16)
    found = []
    for window in (None, 15, 16, 8):
        config = make_config(sliding_window=window, ttt_steps=1)
        own = torch.Generator().manual_seed(0)
        draft = filled_draft(config, own, kept_ids=torch.arange(0, 37, 2))
        found.append(train_logits(draft, batch)[0])

    full, short_by_one, whole, short = found
    assert torch.equal(whole, full)
    assert torch.equal(short_by_one[:15], full[:15])
    assert not torch.equal(short_by_one[15], full[15])
    assert not torch.equal(short[8], full[8])
