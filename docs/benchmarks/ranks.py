"""Compare placements of the weights, and numbers of accumulated sequences, on several ranks.

    torchrun --standalone --nproc_per_node=2 docs/benchmarks/ranks.py --sharding shard replicate

Each line of JSON is what `speculators bench --nproc-per-node` measures. The link between GPUs of
one machine becomes a socket on the loopback interface with `NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1
NCCL_NET=Socket`.
"""

import argparse
import gc
import json

from speculators_cli.core.bench.bench import TIMEOUT_SECONDS, bench_on
from speculators_cli.core.training.distributed import start_ranks
from speculators_cli.settings.bench import BenchSettings

KEYS = (
    "num_ranks num_shards alone_step_ms step_ms step_ms_min step_ms_max efficiency "
    "tokens_per_second exposed_ms idle_share launch_ms loss peak_memory_bytes "
    "estimated_memory_bytes"
)


def main() -> None:
    """Measure each combination on the same ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--algorithm", default="eagle3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sharding", nargs="+", default=["shard"])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1])
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with start_ranks(options.device, TIMEOUT_SECONDS) as ranks:
        ranks.connect(TIMEOUT_SECONDS)
        for sharding in options.sharding:
            for accumulation in options.accumulation:
                gc.collect()  # The draft before would count into the peak: its hooks refer to it.
                step = {
                    "total_seq_len": options.total_seq_len,
                    "gradient_accumulation_steps": accumulation,
                    "sharding": sharding,
                    "device": options.device,
                }
                shape = {
                    "shape": options.shape,
                    "algorithm": options.algorithm,
                    "draft_vocab_size": options.draft_vocab_size,
                }
                content = {"shape": shape, "step": step, "measure": {"steps": options.steps}}
                report = bench_on(BenchSettings.model_validate(content), ranks).to_json()
                if ranks.is_first:
                    found = {key: report[key] for key in KEYS.split()}
                    split = {"split_ms": report["split_ms"]}
                    print(json.dumps(step | shape | found | split), flush=True)


if __name__ == "__main__":
    main()
