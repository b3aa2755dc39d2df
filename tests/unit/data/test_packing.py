"""plan_epoch(): a pure function that fills sequences and deals them out evenly."""

import numpy as np
import pytest
from numpy.typing import NDArray

from speculators_cli.core.data.packing import plan_epoch


def log_normal_lengths(num_samples: int, seed: int = 0) -> NDArray[np.int64]:
    """Conversations of about 1,100 tokens in the middle, cut at 8,192."""
    drawn = np.random.default_rng(seed).lognormal(7.0, 0.9, num_samples)
    return np.clip(drawn, 16, 8192).astype(np.int64)


@pytest.mark.parametrize("global_batch", [1, 8])
def test_every_sample_is_used_once_and_fits(global_batch: int) -> None:
    lengths = log_normal_lengths(5000)
    lengths[7] = 0

    plan = plan_epoch(lengths, total_seq_len=4096, seed=3, epoch=1, global_batch=global_batch)

    used = sorted(i for sequence in plan.sequences for i in sequence)
    assert used == [i for i in range(5000) if i != 7]
    sums = [np.minimum(lengths[list(sequence)], 4096).sum() for sequence in plan.sequences]
    assert max(sums) <= 4096
    assert len(plan.sequences) == plan.num_steps * global_batch


def test_97_percent_of_positions_are_filled_on_log_normal_lengths() -> None:
    plan = plan_epoch(
        log_normal_lengths(20_000), total_seq_len=8192, seed=0, epoch=0, global_batch=8
    )

    assert plan.fill >= 0.97


def test_the_samples_of_a_sequence_are_of_all_lengths() -> None:
    # A step over samples of one length would not represent the others.
    lengths = log_normal_lengths(4000)
    plan = plan_epoch(lengths, total_seq_len=8192, seed=0, epoch=0, global_batch=1)

    logs = np.log(lengths)
    errors = [
        len(sequence) * (logs[list(sequence)].mean() - logs.mean()) ** 2
        for sequence in plan.sequences
    ]

    # Samples drawn at random would have a ratio of 1, longest first has 4.
    assert np.mean(errors) / logs.var() < 1.2


def test_ranks_get_about_the_same_tokens() -> None:
    lengths = log_normal_lengths(20_000)
    plan = plan_epoch(lengths, total_seq_len=8192, seed=0, epoch=0, global_batch=8)

    tokens = [sum(lengths[i] for s in plan.sequences[rank::8] for i in s) for rank in range(8)]

    assert max(tokens) / min(tokens) < 1.02


def test_the_plan_depends_on_seed_and_epoch_and_nothing_else() -> None:
    lengths = log_normal_lengths(500)

    def plan(seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
        return plan_epoch(
            lengths, total_seq_len=4096, seed=seed, epoch=epoch, global_batch=4
        ).sequences

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)


def test_fewer_samples_than_the_global_batch_leave_empty_sequences() -> None:
    plan = plan_epoch(
        np.array([5, 6, 7], dtype=np.int64), total_seq_len=32, seed=0, epoch=0, global_batch=4
    )

    assert sorted(len(sequence) for sequence in plan.sequences) == [0, 1, 1, 1]


def test_a_million_samples_are_planned_as_well_as_a_few() -> None:
    plan = plan_epoch(
        log_normal_lengths(1_000_000), total_seq_len=8192, seed=0, epoch=0, global_batch=8
    )

    assert sum(map(len, plan.sequences)) == 1_000_000
    assert plan.fill >= 0.97
