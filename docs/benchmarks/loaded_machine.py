"""Time a capture beside competing processes, by how idle threads wait.

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

from speculators_cli.__main__ import SPIN_COUNT

NUM_PROMPTS, MAX_NEW_TOKENS = 24, 96
SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"OMP_WAIT_POLICY": "PASSIVE"},
    {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
)


def measure() -> float:
    """Seconds of the capture, in this process; models and imports are loaded before."""
    from speculators_cli.core.capture.generate import generate_data
    from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts, write_prompts
    from speculators_cli.core.progress import SILENT
    from speculators_cli.settings.generate_data import GenerateDataSettings

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(read_prompts()[:NUM_PROMPTS], prompts)
        settings = GenerateDataSettings.model_validate(
            {
                "input": {"prompts": str(prompts), "output_dir": Path(folder) / "data"},
                "verifier": {"verifier_name_or_path": str(VERIFIER_DIR)},
                "tokens": {"regenerate": True, "max_new_tokens": MAX_NEW_TOKENS},
                "engine": {"device": "cpu"},
            }
        )
        started_at = time.perf_counter()
        generate_data(settings, progress=SILENT)
        return time.perf_counter() - started_at


def measure_in_child(variables: dict[str, str]) -> float:
    """The same in a process with these environment variables."""
    done = subprocess.run(  # noqa: S603 - this script
        [sys.executable, __file__, "--child"],
        env={**os.environ, **variables},
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
    print("| Competing processes | Default of OpenMP | Sleep at once | Default of `speculators` |")
    print("| --- | --- | --- | --- |")
    for num_processes in options.competitors:
        with competing(num_processes):
            times = [measure_in_child(variables) for variables in SETTINGS]
        print(f"| {num_processes} | " + " | ".join(f"{x:.1f} s" for x in times) + " |", flush=True)


if __name__ == "__main__":
    main()
