"""Time the capture of hidden states by a verifier with random weights, on one GPU.

python docs/benchmarks/capture.py --shape llama-3.1-8b --to-disk /tmp/capture
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
    },
}  # fmt: skip


def build(shape: str, device: str, dtype: torch.dtype, *, is_compiled: bool) -> TransformersEngine:
    """A verifier of this shape with random weights."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    n = config.num_hidden_layers
    return TransformersEngine(
        model, (2, n // 2, n - 3), end_ids=frozenset({0}), name=shape, is_compiled=is_compiled
    )


def packed_sequence(num_tokens: int, num_documents: int, vocab_size: int) -> Packed:
    """Random tokens in documents of unequal length, the last 60 % of each supervised."""
    cuts = torch.linspace(0, 1, num_documents + 1).pow(1.3).mul(num_tokens).long()
    lengths = cuts.diff().tolist()
    is_supervised = torch.cat([torch.arange(n) >= 0.4 * n for n in lengths])
    ids = torch.randint(vocab_size, (num_tokens,))
    return Packed(ids, lengths, is_supervised.nonzero().flatten())


def main() -> None:
    """Print milliseconds per packed sequence and tokens per second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    started_at = time.perf_counter()
    engine = build(options.shape, options.device, dtype, is_compiled=not options.eager)
    print(f"built in {time.perf_counter() - started_at:.1f} s, packed: {engine.is_packed}")
    packed = packed_sequence(options.tokens, options.documents, 1000)
    host = [torch.empty(0), torch.empty(0)]
    seconds = []
    for repeat in range(options.repeats + 3):
        started_at = time.perf_counter()
        states = engine.capture(packed)
        if repeat == 0 and options.device == "cuda":
            host = [
                torch.empty_like(x, device="cpu").pin_memory() for x in (states.aux, states.last)
            ]
        if options.device == "cuda":
            for place, found in zip(host, (states.aux, states.last), strict=True):
                place.copy_(found, non_blocking=True)
            torch.cuda.synchronize()
        taken = time.perf_counter() - started_at
        if repeat < 3:
            print(f"  warm-up {taken:.2f} s")
        else:
            seconds.append(taken)
    median = statistics.median(seconds)
    print(
        f"{options.shape}, {options.tokens:,} tokens in {options.documents} documents, "
        f"{'eager' if options.eager else 'compiled'}: {median * 1000:.1f} ms "
        f"({min(seconds) * 1000:.1f} to {max(seconds) * 1000:.1f}), "
        f"{options.tokens / median:,.0f} tokens/s, copy to the host included"
    )
    if options.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
