"""What a command costs beside other processes on the same cores."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from speculators_cli.__main__ import SPIN_COUNT, WAIT_VARIABLES, limit_spinning

# Products of a small model's size, each of them the work of a team of threads.
WORK = """
import time
from speculators_cli.__main__ import limit_spinning
limit_spinning()
import torch
a, b = torch.randn(2, 256, 256)
for _ in range(200):
    a @ b
started_at = time.perf_counter()
for _ in range(5_000):
    a @ b
print(time.perf_counter() - started_at)
"""


def test_idle_threads_spin_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    limit_spinning()

    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_how_threads_wait_is_the_users_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in WAIT_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")

    limit_spinning()

    assert {other: os.environ.get(other) for other in WAIT_VARIABLES} == {
        other: "1" if other == name else None for other in WAIT_VARIABLES
    }


@contextmanager
def busy_cores() -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_of_work() -> float:
    kept = {key: value for key, value in os.environ.items() if key not in WAIT_VARIABLES}
    kept.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=kept, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
def test_a_competitor_on_each_core_costs_in_proportion() -> None:
    # Half of each core is left, so twice the time; threads that spin take ten times and more.
    quiet = min(seconds_of_work() for _ in range(2))

    with busy_cores():
        loaded = min(seconds_of_work() for _ in range(2))

    assert loaded < 5 * quiet
