"""Two ranks shard a verifier and capture with it, and print a line each: run by the test."""

import json
import sys

import torch
import transformers

from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.training.distributed import start_ranks
from speculators_cli.core.training.sharded_verifier import count_own_bytes, shard_verifier


def main(folder: str) -> None:
    """Compare the states of the sharded verifier with those of the whole one."""
    with start_ranks("cpu", 60) as ranks:
        ranks.connect(60)
        models = [transformers.LlamaForCausalLM.from_pretrained(folder).eval() for _ in range(2)]
        whole_bytes = count_own_bytes(models[0])
        shard_verifier(models[0], ranks, "sharded")
        ids = torch.arange(3, 3 + 12 + ranks.rank)
        packed = Packed(ids, [5, 7 + ranks.rank], torch.arange(len(ids)))
        found, whole = (
            TransformersEngine(
                model, (3, 5), end_ids=frozenset(), name="x", packs_documents=True
            ).capture(packed)
            for model in models
        )
        line = {
            "rank": ranks.rank,
            "own_bytes": count_own_bytes(models[0]),
            "whole_bytes": whole_bytes,
            "is_equal": torch.equal(found.aux, whole.aux) and torch.equal(found.last, whole.last),
        }
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
