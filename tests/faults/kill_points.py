"""Runs a job once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.kill_points INPUTS_FOLDER JOB EVERY

Jobs: `train`; `behind`: train with a checkpoint every third step; `over`: train with
`--no-resume-from-checkpoint` over an old run; `ranks`: train on two ranks, of which one or the
other is killed; `export`. EVERY: try each so many-th point.

The parent imports everything and starts no thread, so each run is a fork that costs a second, not
ten. Kill points are the changes that Python itself reports in the folder (files opened for writing,
folders made, renames, removals, links), and writes of weights, which no hook sees: there the system
ends the process inside the write that makes a file longer than so many bytes. After each kill every
checkpoint that is found must be whole, and the run that follows must end in the very bytes of the
uninterrupted one.

Checkpoints are written by a thread. Before it is killed there, it gives the training time for a
step, and whether steps were done that the checkpoint does not have is counted.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints, hash_file
from speculators_cli.core.export.export import export
from speculators_cli.core.progress import SilentProgress, StepReport
from speculators_cli.core.training import saver
from speculators_cli.core.training.run import train
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.saver import write
from speculators_cli.core.training.snapshot import Snapshot
from speculators_cli.settings.export import ExportSettings
from tests.tiny_run import TinyInputs

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}
SHARES = (0.02, 0.5, 0.98)  # of a file of weights, at which it is torn
STEP_SECONDS = 0.5  # the longest wait for a step of the training


@dataclass(frozen=True)
class Point:
    """Where a run is killed."""

    change: int  # number of the change on disk, from 1
    num_bytes: int | None = None  # None: before the change; else in the write to that length
    victim: int = 0  # rank


def watch(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call `act` with number, kind and path of each change below `folder`, before it happens."""
    num_changes = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_changes
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
        if not (is_write or event in CHANGES):
            return
        paths = [str(x) for x in arguments if isinstance(x, str | os.PathLike)]
        if any(str(folder) in path for path in paths):
            num_changes += 1
            act(num_changes, f"{event} {paths[0]}")

    sys.addaudithook(hook)


class Steps(SilentProgress):
    """Counts the steps of a run, and those that the checkpoint being written has."""

    def __init__(self) -> None:
        self.done = self.written = 0

    @property
    def is_writer(self) -> bool:
        """Whether this thread writes checkpoints while another trains."""
        return self.written > 0 and threading.current_thread() is not threading.main_thread()

    def trained(self, report: StepReport) -> None:
        """Count a step."""
        self.done = report.step

    def write(self, folder: RunFolder, snapshot: Snapshot, *, keep: int | None) -> float:
        """Write a checkpoint, in the thread."""
        self.written = snapshot.state.step
        return write(folder, snapshot, keep=keep)

    def wait_for_one(self) -> bool:
        """Let the training do a step; returns whether it is ahead of the checkpoint."""
        until = time.monotonic() + STEP_SECONDS
        while self.done <= self.written and time.monotonic() < until:
            time.sleep(0.001)
        return self.done > self.written


STEPS = Steps()  # of the run in this process


def kill(point: Point, other: int | None) -> None:
    """Kill this process, now or in a write, or the other rank's."""
    if point.victim:
        assert other is not None
        os.kill(other, signal.SIGKILL)
    elif point.num_bytes is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        kill_in_write(point.num_bytes)


def kill_in_write(num_bytes: int) -> None:
    """Let the system end this process inside the write that makes a file longer than that."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def fork(
    work: Callable[[], object],
    folder: Path,
    *,
    point: Point | None = None,
    log: Path | None = None,
    other: int | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """Start work in a fork that is killed at a point; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # here: only the main thread may
    saver.write = STEPS.write
    os.environ.update(environment or {})
    changes: list[str] = []

    def act(number: int, change: str) -> None:
        if log is not None:
            changes.append(change)
        if point is not None and number == point.change:
            if STEPS.is_writer and STEPS.wait_for_one():
                mark_of(folder).touch()
            kill(point, other)

    watch(folder, act)
    code = 1
    try:
        work()
        code = 0
        if log is not None:
            log.write_text(json.dumps(changes))
    finally:
        os._exit(code)


def mark_of(folder: Path) -> Path:
    """The file that a kill leaves if the training was ahead of the checkpoint being written."""
    return folder.with_name(f"ahead-of-{folder.name}")


def wait(pid: int) -> int:
    """Exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Job:
    """What is run, where it writes, and what must be true after a kill."""

    num_ranks = 1

    def __init__(self, inputs: TinyInputs) -> None:
        self.inputs = inputs

    def prepare(self, folder: Path) -> None:
        """What is there before the job."""

    def trained_before(self, name: str, **run: int) -> Path:
        """The save path of a run that no kill disturbs, made once."""
        path = self.inputs.folder / name
        if not path.exists():
            settings = self.inputs.settings(run={"save_path": path, **run}, data={"num_workers": 0})
            assert wait(fork(lambda: train(settings, progress=SilentProgress()), path)) == 0
        return path

    def work(self, folder: Path) -> Callable[[], object]:
        """The job, as it is started first."""
        return self._train(folder)

    every = 1  # steps per checkpoint

    def _train(self, folder: Path, *, resume: bool = True) -> Callable[[], object]:
        settings = self.inputs.settings(
            run={"save_path": folder, "epochs": 2, "resume_from_checkpoint": resume},
            checkpoints={"checkpoint_every_steps": self.every, "keep_checkpoints": 1},
            data={"num_workers": 0, "total_seq_len": 256},
            distributed={"device": "cpu", "timeout_seconds": 20},
        )
        return lambda: train(settings, progress=STEPS)

    def again(self, folder: Path) -> Callable[[], object]:
        """The job, as it is started after a kill."""
        return self.work(folder)

    def check(self, folder: Path) -> None:
        """Whether what a kill has left is whole."""
        for checkpoint in find_checkpoints(folder):
            checkpoint.verify()

    def result(self, folder: Path) -> Any:
        """What must be the same as without a kill."""
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        runs = sorted({c.state.run_id for c in find_checkpoints(folder)})
        weights = [hash_file(folder / "1" / name) for name in WEIGHTS]
        return [left, len(runs), weights]

    def weights(self, folder: Path) -> list[Path]:
        """The files of weights that the job writes at once."""
        return [folder / "1" / name for name in WEIGHTS]

    def run(self, folder: Path, point: Point | None, log: Path | None, *, is_again: bool) -> int:
        """Run the job in forks, one a rank; returns rank 0's exit status."""
        work = self.again(folder) if is_again else self.work(folder)
        if self.num_ranks == 1:
            return wait(fork(work, folder, point=point, log=log))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2"}
        second = fork(work, folder, environment={**shared, "RANK": "1", "LOCAL_RANK": "1"})
        first = fork(
            work,
            folder,
            point=point,
            log=log,
            other=second,
            environment={**shared, "RANK": "0", "LOCAL_RANK": "0"},
        )
        status = wait(first)
        if status != 0:
            os.kill(second, signal.SIGKILL)  # as the launcher does
        wait(second)
        return status


WEIGHTS = ("model.safetensors", "trainer/optimizer.safetensors")


class Over(Job):
    """Train over an old run."""

    def prepare(self, folder: Path) -> None:
        old = self.trained_before("old", epochs=2, seed=1)
        shutil.copytree(old, folder, symlinks=True)

    def work(self, folder: Path) -> Callable[[], object]:
        return self._train(folder, resume=False)

    def again(self, folder: Path) -> Callable[[], object]:
        # Once the new run has saved anything, nothing else may be resumed.
        return self._train(folder, resume=find_checkpoints(folder)[-1].state.generation == 2)

    def check(self, folder: Path) -> None:
        super().check(folder)
        found = find_checkpoints(folder)
        assert found, "neither the old run nor the new one is there"
        if found[-1].state.generation == 1:
            assert [c.folder.name for c in found] == ["0", "1"], "the old run went too early"


class Behind(Job):
    """Train, with steps between the checkpoints."""

    every = 3


class TwoRanks(Job):
    """Train on two ranks."""

    num_ranks = 2


class Export(Job):
    """Export a checkpoint, over an older export."""

    def prepare(self, folder: Path) -> None:
        self.trained_before("source", epochs=1)
        folder.mkdir()

    def work(self, folder: Path) -> Callable[[], object]:
        content = {
            "source": {"checkpoint": str(self.inputs.folder / "source")},
            "export": {"output_dir": folder / "served", "overwrite": True, "dtype": "float32"},
        }
        settings = ExportSettings.model_validate(content)
        return lambda: export(settings, progress=SilentProgress())

    def check(self, folder: Path) -> None:
        served = folder / "served"
        if served.exists():
            assert (served / "README.md").exists(), "a part of an export has its name"

    def result(self, folder: Path) -> Any:
        files = {f.name: hash_file(f) for f in (folder / "served").iterdir()}
        return [sorted(path.name for path in folder.iterdir()), files]

    def weights(self, folder: Path) -> list[Path]:
        return [folder / "served" / "model.safetensors"]


JOBS: dict[str, type[Job]] = {
    "train": Job,
    "behind": Behind,
    "over": Over,
    "ranks": TwoRanks,
    "export": Export,
}


def list_points(job: Job, changes: list[str], folder: Path) -> list[Point]:
    """Every change, and lengths of each file of weights after each folder made for them."""
    points = [Point(i) for i in range(1, len(changes) + 1)]
    made = re.compile(r"os\.mkdir .*/(trainer|new)")
    begun = [i for i, change in enumerate(changes, 1) if made.fullmatch(change)]
    sizes = [file.stat().st_size for file in job.weights(folder)]
    # A file is torn behind the length of those before it, which are written whole.
    lengths = [
        before + int(share * (size - before))
        for before, size in zip([0, *sizes], sizes, strict=False)
        for share in SHARES
    ]
    points += [Point(i, num_bytes=length) for i in begun for length in lengths]
    if job.num_ranks > 1:
        points += [Point(i, victim=1) for i in range(1, len(changes) + 1)]
    return points


def try_point(job: Job, point: Point, folder: Path, expected: Any) -> str | None:
    """Kill a run at a point and run it again; returns what is wrong afterwards."""
    job.prepare(folder)
    status = job.run(folder, point, None, is_again=False)
    try:
        assert status != 0 or point.victim, "was not reached"
        if point.victim == 0:
            assert status in (-signal.SIGKILL, -signal.SIGXFSZ), f"ended with {status}"
        job.check(folder)
        status = job.run(folder, None, None, is_again=True)
        assert status == 0, f"the run after it ended with {status}"
        result = job.result(folder)
        assert result == expected, f"the run after it ended in {result}, expected {expected}"
    except AssertionError as failure:
        return f"{point}: {failure}"
    shutil.rmtree(folder)
    return None


def main() -> None:
    """Try kill points and print what was found as JSON."""
    inputs, every = TinyInputs(Path(sys.argv[1])), int(sys.argv[3])
    job = JOBS[sys.argv[2]](inputs)
    log, whole = inputs.folder / "log", inputs.folder / "whole"
    job.prepare(whole)
    assert job.run(whole, None, log, is_again=False) == 0
    expected = job.result(whole)
    points = list_points(job, json.loads(log.read_text()), whole)
    tried = points[::every]
    outcomes = [
        try_point(job, point, inputs.folder / f"killed-{number}", expected)
        for number, point in enumerate(tried)
    ]
    report = {
        "num_points": len(points),
        "tried": len(tried),
        "points_in_writes": sum(point.num_bytes is not None for point in points),
        "tried_in_writes": sum(point.num_bytes is not None for point in tried),
        "ahead": sum(mark_of(inputs.folder / f"killed-{n}").exists() for n in range(len(tried))),
        "failures": [outcome for outcome in outcomes if outcome is not None],
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
