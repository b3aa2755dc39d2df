"""Two ranks shard a verifier and capture with it, and print a line each: run by the test."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers

from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.sharded_verifier import count_own_bytes, shard_verifier

NUM_PASSES = 3


class PassError(Exception):
    """Raised in the middle of a pass."""


def main(folder: str, device: str) -> None:
    """Compare the states of sharded verifiers with those of whole ones."""
    with start_ranks(device, 60) as ranks:
        ranks.connect(60)
        # With an odd number of layers, and with an even one.
        lines = [compare(folder, num_layers, ranks) for num_layers in (9, 8)]
        # One write, which that of the other rank does not divide.
        print(json.dumps({"rank": ranks.rank, "models": lines}) + "\n", end="", flush=True)  # noqa: T201


def compare(folder: str, num_layers: int, ranks: Ranks) -> dict[str, Any]:
    """Capture some documents with a whole and a sharded verifier of so many layers."""
    whole, sharded = (
        transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=num_layers).eval()
        for _ in range(2)
    )
    whole_bytes = count_own_bytes(whole)
    whole.to(ranks.device)
    shard_verifier(sharded, ranks, "sharded")
    engines = [
        TransformersEngine(model, (3, 5), end_ids=frozenset(), name="x", packs_documents=True)
        for model in (whole, sharded)
    ]
    are_equal = [is_equal(engines, first, ranks) for first in range(3, 3 + NUM_PASSES)]
    with interrupting(sharded.model.layers[4]), suppress(PassError):
        engines[1].join()
    are_equal.append(is_equal(engines, 3, ranks))
    return {
        "own_bytes": count_own_bytes(sharded),
        "whole_bytes": whole_bytes,
        "are_equal": are_equal,
    }


def is_equal(engines: list[TransformersEngine], first: int, ranks: Ranks) -> bool:
    """Whether all engines have the same states, in every bit."""
    ids = torch.arange(first, first + 12 + ranks.rank)
    packed = Packed(ids, [5, 7 + ranks.rank], torch.arange(len(ids)))
    one, other = (engine.capture(packed) for engine in engines)
    assert one.aux.any()
    return torch.equal(one.aux, other.aux) and torch.equal(one.last, other.last)


@contextmanager
def interrupting(layer: torch.nn.Module) -> Iterator[None]:
    """Raise an error before the layer within the block."""

    def interrupt(*_: object) -> None:
        raise PassError

    hook = layer.register_forward_pre_hook(interrupt)
    yield
    hook.remove()


if __name__ == "__main__":
    main(*sys.argv[1:])
