"""Time a capture beside competing processes, with idle threads that spin or sleep.

The embedded verifier answers prompts of the demo.

python docs/benchmarks/loaded_machine.py --competitors 0 1 2
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NUM_PROMPTS, MAX_NEW_TOKENS = 24, 96


def measure() -> float:
    """Seconds of the capture, in this process; models and imports are loaded before."""
    import torch

    from speculators_cli.core.capture.capture import capture
    from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
    from speculators_cli.core.models.verifier_model import VerifierModel
    from speculators_cli.core.progress import SilentProgress

    verifier = VerifierModel(str(VERIFIER_DIR), (1, 4, 6), dtype=torch.float32)
    prompts = [verifier.tokenizer(text)["input_ids"] for text in read_prompts()[:NUM_PROMPTS]]
    with tempfile.TemporaryDirectory() as folder:
        started_at = time.perf_counter()
        capture(
            verifier,
            prompts,
            Path(folder) / "data",
            verifier_name="embedded",
            max_new_tokens=MAX_NEW_TOKENS,
            progress=SilentProgress(),
        )
        return time.perf_counter() - started_at


def measure_in_child(policy: str) -> float:
    """The same in a process whose idle threads wait by this policy."""
    done = subprocess.run(  # noqa: S603 - this script
        [sys.executable, __file__, "--child"],
        env={**os.environ, "OMP_WAIT_POLICY": policy},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


@contextmanager
def competing(num_processes: int) -> Iterator[None]:
    """Run processes that keep a core busy each."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """Print a table of seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--competitors", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(measure())
        return
    print("| competing processes | idle threads spin | idle threads sleep |")
    print("| --- | --- | --- |")
    for num_processes in options.competitors:
        with competing(num_processes):
            spin, sleep = (measure_in_child(policy) for policy in ("ACTIVE", "PASSIVE"))
        print(f"| {num_processes} | {spin:.1f} s | {sleep:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
