"""Time the all-reduce by which ranks agree, after each step, whether a stop signal has arrived."""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_WARMUP, NUM_TIMED = 100, 1000


def time_rank(rank: int, num_ranks: int, port: int) -> None:
    """Reduce as `Ranks.max` does, and print the median of rank 0."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    times = []
    for _ in range(NUM_WARMUP + NUM_TIMED):
        started_at = time.perf_counter()
        value = torch.zeros((), dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True).wait()
        times.append((time.perf_counter() - started_at) * 1e3)
    if rank == 0:
        print(f"{num_ranks} ranks: {statistics.median(times[NUM_WARMUP:]):.3f} ms per step")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--port", type=int, default=29731)
    arguments = parser.parse_args()
    for num_ranks in arguments.ranks:
        mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
            time_rank, (num_ranks, arguments.port + num_ranks), nprocs=num_ranks
        )
