"""Where the float32 weights of a run are: on one rank, copied to all, or sharded."""

import torch

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.training.distributed import Ranks, count_shards
from speculators_cli.core.training.weights import DraftWeights, ReplicatedWeights


def place_weights(
    draft: DraftModel,
    ranks: Ranks,
    sharding: str,
    compute_dtype: torch.dtype,
    *,
    num_accumulated: int,
) -> DraftWeights:
    """Place the weights of a draft, which is the same on every rank; all ranks must call.

    Args:
        draft: On its device.
        ranks: Connected, if there are several.
        sharding: `--sharding`.
        compute_dtype: Of the layers.
        num_accumulated: Packed sequences of a rank per optimizer step.
    """
    set_gradient_dtypes(draft, compute_dtype, num_addends=ranks.num_ranks * num_accumulated)
    if ranks.num_ranks == 1:
        return DraftWeights(draft)
    num_trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    num_shards = count_shards(ranks, sharding, num_trained)
    if num_shards == 1:
        return ReplicatedWeights(draft, ranks)
    # One rank does without what this imports, which takes a second.
    from speculators_cli.core.training.sharded_weights import ShardedWeights

    return ShardedWeights(draft, ranks, num_shards, compute_dtype)


def set_gradient_dtypes(draft: DraftModel, compute_dtype: torch.dtype, *, num_addends: int) -> None:
    """Store gradients to which nothing is added in the compute dtype; others stay in float32.

    They take half of the memory, and are rounded as what they are products of.

    Args:
        draft: On its device.
        compute_dtype: Of the layers.
        num_addends: Packed sequences per optimizer step, of all ranks.
    """
    if num_addends == 1:
        for weight in draft.once_run_weights():
            weight.grad_dtype = compute_dtype
