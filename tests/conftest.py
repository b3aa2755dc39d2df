"""A tiny run, ready to train; a terminal that writes no escape codes; no network; signals."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

# Before anything imports a library that reads them. Workers share the cores: a thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels; read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from speculators_cli.core.signals import StopSignals
from tests.fork_server import ForkServer
from tests.run_files import tree
from tests.speed import speed_up
from tests.tiny_run import TinyInputs, write_inputs

ONE_AT_A_TIME = {"gpu", "multi_gpu", "vllm", "sglang", "demo"}  # each takes the machine for itself
MAX_WORKERS = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core; none for single files, which end before workers have started."""
    are_files = all(".py" in argument for argument in config.args)
    if are_files or config.option.markexpr in ONE_AT_A_TIME:
        return 0
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2, MAX_WORKERS)


def pytest_configure() -> None:
    """Let a connection to another machine fail the test that opens it; wait for nothing else."""
    sys.addaudithook(refuse_network)
    speed_up()


def refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: connections stay on this machine."""
    if event != "socket.connect":
        return
    address = arguments[1]
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"A test connects to {address}")


@pytest.fixture(autouse=True)
def _signals_from_outside_end_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code under test keeps the stop signals that tests send; others go where they went before.

    Training takes a stop signal for its own and ends by itself: the suite would go on.
    """
    kill, receive = os.kill, StopSignals._receive
    num_sent: Counter[int] = Counter()

    def counting_kill(pid: int, number: int) -> None:
        num_sent[number] += pid == os.getpid()
        kill(pid, number)

    def receive_own(signals: StopSignals, number: int, frame: FrameType | None) -> None:
        if num_sent[number]:
            num_sent[number] -= 1
            receive(signals, number, frame)
            return
        signal.signal(number, signals._old[signal.Signals(number)])
        kill(os.getpid(), number)

    monkeypatch.setattr(os, "kill", counting_kill)
    monkeypatch.setattr(StopSignals, "_receive", receive_own)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs programs in processes of their own, which start at once."""
    with closing(ForkServer()) as server:
        yield server


@pytest.fixture(scope="session")
def shared_inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyInputs]:
    """Verifier, samples and maps, written once; a test that writes into them fails the last one."""
    inputs = write_inputs(tmp_path_factory.mktemp("tiny"))
    written = tree(inputs.folder)
    yield inputs
    assert tree(inputs.folder) == written


@pytest.fixture
def tiny(shared_inputs: TinyInputs, tmp_path: Path) -> TinyInputs:
    """The shared inputs, with a folder of one's own for what a run writes."""
    for name in ("verifier", "data", "d2t.npy", "t2d.npy"):
        (tmp_path / name).symlink_to(shared_inputs.folder / name)
    return TinyInputs(tmp_path)


@pytest.fixture
def data_dir(tiny: TinyInputs) -> Path:
    """The tiny samples in a folder that may be written into."""
    folder = tiny.folder / "copied"
    folder.mkdir()
    for file in tiny.data_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "120")
