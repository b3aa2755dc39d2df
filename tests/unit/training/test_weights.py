"""How many shards a draft has, and which gradients are summed together."""

import pytest
import torch
from torch import nn

from speculators_cli.core.training.distributed import MIN_SHARDED_WEIGHTS, Ranks, count_shards
from speculators_cli.core.training.weights import NUM_SUMS, fill_buckets


@pytest.mark.parametrize(
    ("sharding", "num_trained", "num_shards"),
    [
        ("shard", 1, 8),
        ("replicate", 10**9, 1),
        ("auto", MIN_SHARDED_WEIGHTS, 4),  # within a machine
        ("auto", MIN_SHARDED_WEIGHTS - 1, 1),
    ],
)
def test_shards_of_two_machines(sharding: str, num_trained: int, num_shards: int) -> None:
    ranks = Ranks(5, 8, 1, 4, torch.device("cpu"), None)

    assert count_shards(ranks, sharding, num_trained) == num_shards


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], [[]]),
        ([3], [[3]]),
        ([1] * NUM_SUMS, [[1]] * NUM_SUMS),
        ([50, 20, 10, 10, 5, 5], [[50], [20], [10, 10], [5, 5]]),  # an eighth is 12.5
    ],
)
def test_a_bucket_is_full_at_an_eighth_of_all_values(
    sizes: list[int], buckets: list[list[int]]
) -> None:
    parameters = [nn.Parameter(torch.zeros(size, 1)) for size in sizes]

    filled = fill_buckets(parameters)

    assert [[len(p) for p in bucket] for bucket in filled] == buckets
