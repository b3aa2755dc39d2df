"""Which rows of a packed sequence are computed."""

import numpy as np
import pytest
import torch

from speculators_cli.core.algorithms.eagle3.active_rows import find_active_rows
from speculators_cli.core.algorithms.objective import scored_positions
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.kernels.spans import Spans
from tests.tiny_drafts import make_config, make_sample, pack


@pytest.mark.parametrize("are_drawn", [False, True])
def test_active_rows_are_those_that_reach_a_loss(are_drawn: bool, rng: torch.Generator) -> None:
    config = make_config(ttt_steps=4)
    batch = pack(*(make_sample(n, config, rng) for n in (9, 12, 2)), total_seq_len=24)
    if are_drawn:
        batch = DepthSampling(0.6, 0.2).draw(batch, 4, seed=0, epoch=0)

    rows = find_active_rows(batch, 4)

    scored = scored_positions(batch.loss_mask, batch.document_ids, 4, depths=batch.depths)
    assert sorted(rows.rows.tolist()) == scored.any(0).nonzero().flatten().tolist()
    assert 0 < len(rows.rows) < 24
    assert (rows.counts == (len(rows.rows),) * 4) != are_drawn
    found = rows.by_step(rows.pairs.targets + 1) - 1
    for step in range(4):
        targets = found[step]
        positions = rows.rows[targets >= 0]
        assert sorted(positions.tolist()) == scored[step].nonzero().flatten().tolist()
        assert torch.equal(batch.targets[targets[targets >= 0]], positions + step)
        assert (targets[rows.counts[step] :] < 0).all()
        assert torch.equal(rows.needed[rows.needed_rows[step]], rows.shifted_rows[step])


@pytest.mark.parametrize("are_drawn", [False, True])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_chunks_of_pairs_are_of_whole_rows_and_have_all_their_targets(
    size: int, are_drawn: bool, rng: torch.Generator
) -> None:
    config = make_config(ttt_steps=4)
    batch = pack(*(make_sample(n, config, rng) for n in (9, 12, 2)), total_seq_len=24)
    if are_drawn:
        batch = DepthSampling(0.6, 0.2).draw(batch, 4, seed=0, epoch=0)
    rows = find_active_rows(batch, 4)
    row_of = rows.cells % len(rows.rows)

    chunks = rows.pairs.split(size)

    assert [chunk.start for chunk, _ in chunks[1:]] == [chunk.stop for chunk, _ in chunks[:-1]]
    assert (chunks[0][0].start, chunks[-1][0].stop) == (0, len(rows.cells))
    assert (len(chunks) == 1) == (size == 100)
    for chunk, targets in chunks:
        assert chunk.start < chunk.stop <= chunk.start + size + 4
        assert set(row_of[chunk].tolist()).isdisjoint(row_of[chunk.stop :].tolist())
        within = rows.pairs.targets[chunk]
        assert targets.start <= within[within >= 0].min()
        assert within.max() < targets.stop


def test_rows_without_gaps_are_left_as_they_lie() -> None:
    spans = Spans.of_rows((0, 5, 9), np.array([3, 4, 5, 6, 7, 8]), torch.device("cpu"))

    assert spans.query_bounds == (0, 2, 6)
    assert spans.places is None
    assert spans.sources is None


def test_rows_in_another_order_have_the_same_places() -> None:
    rows = np.array([6, 3, 8, 4])

    spans = Spans.of_rows((0, 5, 9), rows, torch.device("cpu"))

    assert spans.query_bounds == (0, 2, 5)
    assert spans.places is not None
    assert spans.sources is not None
    assert spans.places.tolist() == [2, 0, 4, 1]
    assert spans.sources.tolist() == [1, 3, 0, -1, 2]
