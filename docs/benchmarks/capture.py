"""Time the capture of hidden states by a verifier with random weights, on one GPU.

python docs/benchmarks/capture.py --shape llama-3.1-8b --to-disk /tmp/capture
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from speculators_cli.core.capture.states import (
    SampleWriter,
    WrittenShard,
    pack,
    plan_sequences,
)
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.engines.host_states import HostStates, Storage
from speculators_cli.core.engines.transformers_engine import TransformersEngine

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
    },
}  # fmt: skip


def build(
    shape: str, device: str, dtype: torch.dtype, *, is_compiled: bool, is_float8: bool
) -> TransformersEngine:
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
        model,
        (2, n // 2, n - 3),
        end_ids=frozenset({0}),
        name=shape,
        is_compiled=is_compiled,
        is_float8=is_float8,
    )


def make_rows(num_rows: int, num_tokens: int) -> list[TokenRow]:
    """Rows of random tokens of unequal length, the last 60 % of each supervised."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(num_tokens), 0.5, num_rows), 16, 4 * num_tokens)
    return [
        TokenRow(
            f"{i:06d}",
            random.integers(0, 1000, int(length)).astype(np.int32),
            np.arange(int(length)) >= 0.4 * length,
        )
        for i, length in enumerate(lengths)
    ]


def run(
    engine: TransformersEngine,
    sequences: Sequence[Sequence[TokenRow]],
    storage: Storage,
    folder: Path | None,
) -> float:
    """Capture sequences, with the copy to the host or with files in a folder; return seconds."""
    started_at = time.perf_counter()
    if folder is None:
        for rows in sequences:
            HostStates(engine.capture(pack(rows, storage)), storage)
    else:
        shard = WrittenShard(folder)
        with SampleWriter(storage, 8, lambda _: None) as writer:
            for rows in sequences:
                writer.add(rows, engine.capture(pack(rows, storage)), shard)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_at


def main() -> None:
    """Print milliseconds per packed sequence and tokens per second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192, help="per packed sequence")
    parser.add_argument("--row-tokens", type=int, default=800, help="of a typical row")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--storage-dtype", choices=["bfloat16", "float8"], default="bfloat16")
    parser.add_argument("--to-disk", type=Path, help="also write the samples below this folder")
    parser.add_argument("--compute-dtype", choices=["auto", "float8"], default="auto")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    started_at = time.perf_counter()
    engine = build(
        options.shape,
        options.device,
        dtype,
        is_compiled=not options.eager,
        is_float8=options.compute_dtype == "float8",
    )
    print(f"built in {time.perf_counter() - started_at:.1f} s, packed: {engine.is_packed}")
    storage = Storage(options.storage_dtype, has_all_last_states=False)
    sequences = list(plan_sequences(make_rows(options.rows, options.row_tokens), options.tokens))
    num_tokens = sum(len(row.input_ids) for rows in sequences for row in rows)
    started_at = time.perf_counter()
    run(engine, sequences[:2], storage, None)
    print(f"first sequences, with compilation: {time.perf_counter() - started_at:.1f} s")
    how = f"{options.shape}, {len(sequences)} sequences of at most {options.tokens:,} tokens, "
    how += "eager" if options.eager else "compiled"
    for repeat in range(2):
        seconds = run(engine, sequences, storage, None)
        each = seconds / len(sequences) * 1000
        print(f"{how}, copied to the host: {each:.1f} ms, {num_tokens / seconds:,.0f} tokens/s")
        if options.to_disk is not None:
            folder = options.to_disk / f"run{repeat}"
            folder.mkdir(parents=True)
            written = run(engine, sequences, storage, folder)
            print(
                f"  written as {options.storage_dtype}: {num_tokens / written:,.0f} tokens/s, "
                f"{1 - seconds / written:.1%} slower"
            )
            shutil.rmtree(folder)
    if options.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
