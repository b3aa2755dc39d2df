"""Time the capture of a large verifier, whole on each GPU or sharded by layer across them.

    torchrun --standalone --nproc-per-node 2 docs/benchmarks/sharded.py
    torchrun --standalone --nproc-per-node 2 docs/benchmarks/sharded.py --sharded

Random weights and tokens; each rank computes a packed sequence of its own. If the gathers of layers
hide behind computing, both take as long. Rank 0 prints one line of JSON.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from speculators_cli.core.bench.random_engine import llama_config
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.sharded_verifier import count_own_bytes, shard_verifier


def build(shape: str, num_layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A verifier of this shape; all weights of its matrices are slices of one random vector."""
    verifier, vocab_size = SHAPES[shape]
    config = llama_config(replace(verifier, num_layers=num_layers), vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    random = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            filled = torch.empty(weight.shape, dtype=dtype)
            if weight.dim() == 1:
                filled.fill_(1.0)
            else:
                flat = filled.view(-1)
                for start in range(0, len(flat), len(random)):
                    flat[start : start + len(random)] = random[: len(flat) - start]
            setattr(module, name, nn.Parameter(filled.to(device), requires_grad=False))
    with torch.device(device):  # inverse frequencies are computed, not read
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def measure(given: argparse.Namespace, ranks: Ranks) -> None:
    """Build the verifier, time its captures, print the line."""
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(
        given.shape, given.num_layers, dtype, torch.device("cpu") if given.sharded else device
    )
    if given.sharded:
        shard_verifier(model, ranks, given.shape)
    n = given.num_layers
    engine = TransformersEngine(
        model, (2, n // 2, n - 3), end_ids=frozenset(), name=given.shape, packs_documents=True
    )
    lengths = [given.total_seq_len // 8] * 8
    packed = Packed(
        torch.randint(0, 1000, (sum(lengths),)), lengths, torch.arange(0, sum(lengths), 2)
    )
    times = []
    for step in range(given.steps + 3):
        ranks.max(0.0)  # all ranks begin together
        started_at = time.perf_counter()
        engine.capture(packed)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 3:
            times.append(ranks.max(time.perf_counter() - started_at) * 1e3)
    if ranks.is_first:
        line = {
            "shape": given.shape,
            "num_layers": n,
            "num_ranks": ranks.num_ranks,
            "is_sharded": given.sharded,
            "capture_ms": statistics.median(times),
            "capture_ms_min": min(times),
            "capture_ms_max": max(times),
            "tokens_per_second": ranks.num_ranks * sum(lengths) / statistics.median(times) * 1e3,
            "own_weights_gib": count_own_bytes(model) / 2**30,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
            if device.type == "cuda"
            else None,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--num-layers", type=int, default=32, help="so many fit on one GPU")
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    with start_ranks(given.device, 300) as ranks:
        ranks.connect(300)
        measure(given, ranks)


if __name__ == "__main__":
    main()
