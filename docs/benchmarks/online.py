"""Time training with online capture on one GPU: no disk, no weights, random tokens.

    python docs/benchmarks/online.py
    python docs/benchmarks/online.py --shape qwen3-8b --total-seq-len 8192 --steps 20

Each step computes the hidden states of a packed sequence with a whole verifier of random weights
and trains the draft on them, as `speculators bench --capture` does. Prints one line of JSON:
`sequence_ms` is the time of capture and step for one packed sequence.
"""

import argparse
import json

from speculators_cli.core.bench.bench import bench
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.settings.bench import BenchSettings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--capture-compute-dtype", choices=["auto", "float8"], default="auto")
    given = parser.parse_args()
    report = bench(
        BenchSettings.model_validate(
            {
                "shape": {"shape": given.shape, "draft_vocab_size": given.draft_vocab_size},
                "step": {
                    "total_seq_len": given.total_seq_len, "device": given.device, "capture": True,
                    "capture_compute_dtype": given.capture_compute_dtype,
                },
                "measure": {
                    "steps": given.steps, "warmup_steps": given.warmup_steps, "profile": False,
                },
            }
        )
    )  # fmt: skip
    line = {
        "shape": report.verifier,
        "device": report.device,
        "total_seq_len": report.total_seq_len,
        "sequence_ms": report.step_ms,
        "sequence_ms_min": report.step_ms_min,
        "sequence_ms_max": report.step_ms_max,
        "capture_ms": report.capture_ms,
        "capture_share": report.capture_share,
        "tokens_per_second": report.tokens_per_second,
        "peak_memory_gib": report.peak_memory_bytes and report.peak_memory_bytes / 2**30,
        "first_step_seconds": report.first_step_seconds,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
