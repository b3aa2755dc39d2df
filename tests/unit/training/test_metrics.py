"""Metrics: sums first, one division."""

from typing import Any

import pytest
import torch

from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.algorithms.objective import COUNTERS, RATIOS
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.metrics import MetricSums

ONE_RANK = Ranks(0, 1, 0, 1, torch.device("cpu"), None)


def make_batch(num_tokens: int, num_supervised: int, seq_len: int = 10) -> Batch:
    positions = torch.arange(seq_len)
    fields: dict[str, Any] = {
        "input_ids": positions,
        "aux_hidden_states": torch.zeros(seq_len, 6),
        "targets": positions[:num_supervised],
        "last_hidden_states": torch.zeros(num_supervised, 2),
        "is_normed": torch.zeros(num_supervised).bool(),
        "loss_mask": positions < num_supervised,
        "document_ids": torch.where(positions < num_tokens, 0, -1),
        "position_ids": positions,
        "host_mask": positions < num_supervised,
        "lengths": (num_tokens,),
        "sample_ids": (0,),
    }
    return Batch(**fields)


def make_sums(losses: list[float], scored: list[int], agreed: list[int]) -> StepSums:
    counts = [torch.tensor(x) for x in (scored, agreed, [4, 2], [4, 2], [2, 1])]
    counters = dict(zip(COUNTERS, [torch.tensor(losses), *counts], strict=True))
    return StepSums(torch.tensor(sum(losses)), counters)


def test_a_loss_weighs_every_position_alike() -> None:
    # Trap: a mean of means would give (1/1 + 9/9) / 2 for step 0 whatever the counts.
    sums = MetricSums(COUNTERS, RATIOS, (1.0, 0.5))
    sums.add(make_sums([10.0, 4.0], [1, 2], [1, 0]), make_batch(8, 3))
    sums.add(make_sums([9.0, 0.0], [9, 2], [0, 1]), make_batch(6, 1))

    metrics = sums.reduce(ONE_RANK)

    assert metrics["loss_0"] == pytest.approx(19 / 10)
    assert metrics["loss_1"] == pytest.approx(4 / 4)
    assert metrics["loss"] == pytest.approx(1.9 + 0.5 * 1.0)
    assert metrics["full_acc_0"] == pytest.approx(1 / 10)
    assert metrics["cond_acc_1"] == pytest.approx(2 / 4)
    assert metrics["acceptance_length"] == pytest.approx(1 + 4 / 8 + 2 / 4)
    assert metrics["tokens"] == 14
    assert metrics["supervised_fraction"] == pytest.approx(4 / 14)


def test_nothing_counted_is_unknown_and_no_number() -> None:
    metrics = MetricSums(COUNTERS, RATIOS, (1.0,)).reduce(ONE_RANK)

    assert {name: value for name, value in metrics.items() if value is not None} == {"tokens": 0}
    assert {"loss", "acceptance_length", "supervised_fraction"} < metrics.keys()


def test_a_step_that_nothing_reaches_leaves_the_loss_of_the_others() -> None:
    sums = MetricSums(COUNTERS, RATIOS, (1.0, 0.5))
    sums.add(make_sums([10.0, 0.0], [4, 0], [1, 0]), make_batch(8, 3))

    metrics = sums.reduce(ONE_RANK)

    assert metrics["loss"] == pytest.approx(10 / 4)
    assert metrics["loss_1"] is None
