"""How many shards a draft has, and how its gradients are stored and summed."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from speculators_cli.core.training.distributed import MIN_SHARDED_WEIGHTS, Ranks, count_shards
from speculators_cli.core.training.placement import place_weights
from speculators_cli.core.training.weights import NUM_SUMS, fill_buckets
from tests.tiny_dflash import filled_blocks, make_block_config
from tests.tiny_drafts import make_sample, pack


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


# Of scores that are masked afterwards.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_gradients_to_which_nothing_is_added_are_stored_in_the_compute_dtype() -> None:
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"), None)

    def gradients(num_accumulated: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(0)
        draft = filled_blocks(make_block_config(num_layers=1), rng)
        draft.use_fast_kernels = True
        dtype = torch.bfloat16
        place_weights(draft, alone, "auto", dtype, num_accumulated=num_accumulated)
        batch = pack(*(make_sample(n, draft.config, rng) for n in (6, 8)), total_seq_len=16)
        draft(draft.draw(batch.cast(dtype), seed=0, epoch=0)).loss.backward()
        return {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}

    found, exact = gradients(1), gradients(2)

    assert found.keys() == exact.keys()
    for name, grad in found.items():
        is_rounded = grad.dim() > 1 and name.startswith(("fc.", "layers."))
        assert exact[name].dtype == torch.float32
        assert grad.dtype == (torch.bfloat16 if is_rounded else torch.float32), name
        error = float((grad.float() - exact[name]).norm() / exact[name].norm())
        # Half a unit of 8 bits at most, and a third of that on average. Keys and values are of two
        # products, each of which is rounded, as is their sum.
        assert error == 0 or (is_rounded and 1e-3 < error < 4e-3), name
        assert error > 0 or not is_rounded
