"""Ranks that share the weights of a tiny draft: a program for several ranks."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.training import distributed
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.placement import place_weights
from speculators_cli.core.training.weights import DraftWeights, ReplicatedWeights
from tests.tiny_dflash import filled_blocks, make_block_config
from tests.tiny_drafts import filled_draft, make_config, make_sample, pack

CASES = {
    2: [
        ("shard", "plain", "eagle3"),
        ("shard", "plain", "dflash"),
        ("shard", "fast", "eagle3"),
        ("replicate", "plain", "eagle3"),
    ],
    4: [("auto", "plain", "eagle3")],
}


@dataclass(frozen=True)
class Case:
    """What a draft is shared and computed with."""

    sharding: str
    kernels: str
    algorithm: str

    @property
    def dtype(self) -> torch.dtype:
        """Fast kernels read weights in the compute dtype."""
        return torch.bfloat16 if self.kernels == "fast" else torch.float32


class Wire:
    """Counts the bytes of collectives: those of their whole tensors."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.count("gathered", "allgather_into_tensor_coalesced", lambda whole, *_: whole)
        self.count("scattered", "reduce_scatter_tensor_coalesced", lambda *two: two[1])
        for name in ("allreduce", "allreduce_coalesced"):
            self.count("reduced", name, lambda tensors, *_: tensors)

    def count(self, kind: str, name: str, choose: Callable[..., Any]) -> None:
        real = getattr(dist.ProcessGroup, name)

        def counting(group: Any, *given: Any, **options: Any) -> Any:
            chosen = choose(*given)
            self.bytes[kind] += sum(x.nbytes for x in chosen if isinstance(chosen, list))
            return real(group, *given, **options)

        setattr(dist.ProcessGroup, name, counting)

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted = dict(self.bytes)
        self.bytes.clear()
        return counted


def build(case: Case) -> tuple[DraftModel, Batch]:
    """The same draft and batch on every rank."""
    rng = torch.Generator().manual_seed(0)
    draft: DraftModel
    if case.algorithm == "eagle3":
        draft = filled_draft(make_config(), rng, kept_ids=torch.arange(0, 37, 2))
    else:
        draft = filled_blocks(make_block_config(), rng)
    draft.use_fast_kernels = case.kernels == "fast"
    samples = [make_sample(num_tokens, draft.config, rng) for num_tokens in (6, 4)]
    batch = pack(*samples, total_seq_len=11).cast(case.dtype)
    return draft, draft.draw(batch, seed=0, epoch=0)


def run(weights: DraftWeights, batch: Batch, *, num_batches: int = 1) -> float:
    """The gradients of a step; its loss."""
    scale = torch.tensor(weights.draft.loss_weights) / 8
    for index in range(num_batches):
        loss = weights.draft(batch, scale).loss
        if index == num_batches - 1:
            weights.start_last_backward()
        loss.backward()
    return float(loss.detach())


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clear(weights: DraftWeights) -> None:
    for _, parameter in weights.named_parameters():
        parameter.grad = None


def compare(case: Case, ranks: Ranks, wire: Wire) -> dict[str, Any]:
    """Two steps of shared weights beside those of one process."""
    draft, batch = build(case)
    alone = DraftWeights(build(case)[0])
    shared = place_weights(draft, ranks, case.sharding, case.dtype, num_accumulated=1)
    assert isinstance(shared, ReplicatedWeights)
    run(shared, batch)
    shared.finish_gradients()
    for weights in (alone, shared):
        with torch.no_grad():
            for _, parameter in weights.named_parameters():
                parameter.mul_(1.25)
        weights.publish(trained_only=True)
        clear(weights)
    wire.take()
    expected_loss, loss = run(alone, batch), run(shared, batch)
    num_in_backward = shared.num_sent
    shared.finish_gradients()
    first = wire.take()
    found = {name: whole(p.grad) for name, p in shared.named_parameters()}
    error = max(
        ((found[name] / ranks.num_ranks - whole(p.grad)).abs().max() / whole(p.grad).abs().max())
        for name, p in alone.named_parameters()
    )
    is_float32 = all(x.dtype == torch.float32 for x in found.values())
    clear(shared)
    shared.publish(trained_only=True)
    gathered = wire.take()
    run(shared, batch, num_batches=2)
    shared.finish_gradients()
    names = {id(p): name for name, p in draft.named_parameters()}
    return asdict(case) | {
        "rank": ranks.rank,
        "is_loss_equal": loss == expected_loss,
        "gradient_error": float(error),
        "are_gradients_float32": is_float32,
        "buckets": [[names[id(p)] for p in bucket] for bucket in shared.buckets],
        "num_in_backward": num_in_backward,
        "bytes": first | gathered,
        "accumulated_bytes": wire.take(),
        "num_shards": shared.num_shards,
    }


def disagree(ranks: Ranks) -> dict[str, Any]:
    """Ranks whose backward passes reach other parameters, in another order."""
    draft, _ = build(Case("shard", "plain", "eagle3"))
    shared = place_weights(draft, ranks, "shard", torch.float32, num_accumulated=1)
    matrices = {name: p for name, p in draft.named_parameters() if p.dim() > 1}
    sums = {}
    for step in range(2):
        used = [*matrices.values()]
        if ranks.rank == 1:
            used = used[::-1][step + 1 :]
        shared.start_last_backward()
        loss = torch.zeros(())
        for parameter in used:
            loss = loss * 1.0 + parameter.sum()
        loss.backward()
        shared.finish_gradients()
        sums = {name: float(whole(p.grad).mean()) for name, p in shared.named_parameters()}
    return {"algorithm": "none", "rank": ranks.rank, "sums": sums, "names": list(matrices)}


def main(folder: str) -> None:
    """Run the cases and write what they give into a folder.

    Two ranks are a machine, four are two.
    """
    with start_ranks("cpu", 60) as ranks:
        ranks.connect(60)
        distributed.MIN_SHARDED_WEIGHTS = 0
        wire = Wire()
        lines = [
            compare(Case(*case), replace(ranks, num_local_ranks=2), wire)
            for case in CASES[ranks.num_ranks]
        ]
        if ranks.num_ranks == 2:
            lines.append(disagree(ranks))
        with Path(folder, f"{ranks.rank}.json").open("w") as file:
            json.dump(lines, file)


if __name__ == "__main__":
    main(sys.argv[1])
