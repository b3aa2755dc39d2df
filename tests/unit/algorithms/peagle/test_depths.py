"""COD sampling: which positions are trained at which depths."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.objective import scored_positions
from speculators_cli.core.algorithms.peagle.cost import PEagleCost
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.data.batch import Batch
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from tests.tiny_drafts import make_sample, pack
from tests.tiny_peagle import make_peagle_config


def make_batch(
    rng: torch.Generator, *lengths: int, supervised_fraction: float = 1.0, total_seq_len: int = 128
) -> Batch:
    config = make_peagle_config()
    samples = [
        make_sample(n + 1, config, rng, supervised_fraction=supervised_fraction) for n in lengths
    ]
    return pack(*samples, total_seq_len=total_seq_len)


def draw(batch: Batch, num_depths: int, *, epoch: int = 0, **sampling: Any) -> Tensor:
    """[seq_len]: depths of each position."""
    drawn = DepthSampling(**sampling).draw(batch, num_depths, seed=0, epoch=epoch)
    assert drawn.depths is not None
    return drawn.depths


def test_each_depth_keeps_its_fraction_of_the_positions(rng: torch.Generator) -> None:
    batch = make_batch(rng, 103)

    depths = draw(batch, 5, ratio=0.5, ratio_min=0.2)

    counts = [int((depths > depth).sum()) for depth in range(5)]
    # The last position has no target at a further depth; of the 102 others, 50%, 25% and 20%. Some
    # near the end of the document have no target at depths that they were kept at.
    assert counts[:2] == [103, 51]
    for count, kept in zip(counts[2:], (26, 20, 20), strict=True):
        assert kept - 3 <= count <= kept


def test_all_positions_that_are_scored_are_trained_at_depth_0(rng: torch.Generator) -> None:
    batch = make_batch(rng, 30, 50, supervised_fraction=0.5)

    depths = draw(batch, 4, ratio=0.3, ratio_min=0.0, num_anchors=6)

    assert (depths[batch.host_mask] > 0).all()
    assert int((depths > 1).sum()) <= 2
    # A position ends at its last depth with a target.
    scored = scored_positions(batch.host_mask, batch.document_ids, 4, depths=depths)
    assert depths.tolist() == [
        max((depth + 1 for depth in range(4) if scored[depth, row]), default=0)
        for row in range(128)
    ]


def test_draws_depend_on_seed_epoch_and_sample_only(rng: torch.Generator) -> None:
    batch = make_batch(rng, 40, 60)
    sampling = DepthSampling(0.6, 0.2)

    drawn = [
        sampling.draw(batch, 4, seed=seed, epoch=epoch).depths
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (0, -1), (1, 0))
    ]

    same, again, *others = (depths.tolist() for depths in drawn if depths is not None)
    assert same == again
    assert len({tuple(depths) for depths in (same, *others)}) == 4


def test_a_position_has_its_number_in_any_packed_sequence(rng: torch.Generator) -> None:
    both = make_batch(rng, 40, 60)
    alone = make_batch(rng, 40)

    inside = draw(both, 2, ratio=0.5, ratio_min=0.0)[:40] > 1
    apart = draw(alone, 2, ratio=0.5, ratio_min=0.0)[:40] > 1

    # One has more positions than the other, never others.
    fewer, more = sorted((inside, apart), key=lambda kept: int(kept.sum()))
    assert fewer.sum() > 10
    assert (more | ~fewer).all()


def test_positions_are_drawn_uniformly(rng: torch.Generator) -> None:
    batch = make_batch(rng, 21, total_seq_len=24)

    kept = [draw(batch, 2, epoch=epoch, ratio=0.25, ratio_min=0.0) > 1 for epoch in range(400)]

    counts = np.sum([depths.numpy() for depths in kept], axis=0)
    assert counts.sum() == 400 * 5
    # 100 expected of each; five standard deviations of a binomial are 43.
    assert counts[:20].min() > 57
    assert counts[:20].max() < 143


@pytest.mark.parametrize("sampling", [{}, {"num_anchors": 200}])
def test_without_sampling_nothing_is_drawn(sampling: dict[str, Any], rng: torch.Generator) -> None:
    batch = make_batch(rng, 40, 60)

    assert DepthSampling(**sampling).draw(batch, 4, seed=0, epoch=0) is batch


def test_a_batch_without_supervised_tokens_is_left_as_it_is(rng: torch.Generator) -> None:
    batch = make_batch(rng, 3, supervised_fraction=0.0, total_seq_len=8)

    assert DepthSampling(0.5, 0.2).draw(batch, 4, seed=0, epoch=0) is batch


def test_the_cost_counts_the_passes_that_are_drawn(rng: torch.Generator) -> None:
    config = make_peagle_config(ttt_steps=4)
    batch = make_batch(rng, 60, 60)
    given = {"ttt_steps": 4, "down_sample_ratio": 0.5, "down_sample_ratio_min": 0.3}
    settings = PEagleSettings.model_validate(given)
    every = PEagleSettings.model_validate(given | {"down_sample_ratio": 1.0})

    depths = draw(batch, 4, ratio=0.5, ratio_min=0.3)
    passes = PEagleCost().count_passes(config, settings, 120)
    work, most = (
        PEagleCost().count_work(config, own, batch.host_mask, batch.lengths)
        for own in (settings, every)
    )

    # 120 + 60 + 36 + 36, without those past the ends of documents.
    assert passes == 252
    assert passes - 12 <= int(depths.sum()) <= passes
    assert PEagleCost().count_passes(config, every, 120) == 480
    assert work.num_active == most.num_active == 120
    assert 0.4 < work.flops / most.flops < 0.75
