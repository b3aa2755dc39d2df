"""Which rows of a packed sequence are computed."""

import numpy as np
import torch

from speculators_cli.core.algorithms.eagle3.active_rows import find_active_rows
from speculators_cli.core.algorithms.objective import scored_positions
from speculators_cli.core.kernels.spans import Spans
from tests.tiny_drafts import make_config, make_sample, pack


def test_active_rows_are_those_that_reach_a_loss(rng: torch.Generator) -> None:
    config = make_config(ttt_steps=4)
    batch = pack(*(make_sample(n, config, rng) for n in (9, 12, 2)), total_seq_len=24)

    rows = find_active_rows(batch, 4)

    scored = scored_positions(batch.loss_mask, batch.document_ids, 4)
    assert rows.rows.tolist() == scored.any(0).nonzero().flatten().tolist()
    assert 0 < len(rows.rows) < 24
    for step in range(4):
        targets = rows.targets[:, step]
        positions = rows.rows[targets >= 0]
        assert positions.tolist() == scored[step].nonzero().flatten().tolist()
        assert torch.equal(batch.targets[targets[targets >= 0]], positions + step)
        assert torch.equal(rows.needed[rows.needed_rows[step]], rows.shifted_rows[step])
    for start, stop in ((0, 1), (2, 9), (0, len(rows.rows))):
        first, last = rows.targets_of(start, stop)
        within = rows.targets[start:stop]
        assert first <= within[within >= 0].min()
        assert within.max() < last


def test_rows_without_gaps_are_left_as_they_lie() -> None:
    spans = Spans.of_rows((0, 5, 9), np.array([3, 4, 5, 6, 7, 8]), torch.device("cpu"))

    assert spans.query_bounds == (0, 2, 6)
    assert spans.places is None
    assert spans.sources is None
