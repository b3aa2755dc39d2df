"""Trains the tiny run once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.kill_points INPUTS_FOLDER EVERY

The parent imports everything and starts no thread, so each run is a fork that costs a second, not
ten. Kill points are the changes that Python itself reports in the save path: files opened for
writing, folders made, renames, removals, links. After each kill every checkpoint that is found must
be whole, and the resumed run must end in the very bytes of the uninterrupted one.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints, hash_file
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.settings.train import TrainSettings
from tests.tiny import TinyInputs

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


def watch(save_path: Path, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each change below `save_path`, before it happens."""
    num_changes = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_changes
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
        if not (is_write or event in CHANGES):
            return
        if any(isinstance(x, str | os.PathLike) and str(save_path) in str(x) for x in arguments):
            num_changes += 1
            act(num_changes)

    sys.addaudithook(hook)


def run(inputs: TinyInputs, save_path: Path, *, kill_at: int | None, count: Path | None) -> int:
    """Train in a fork; returns its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)

        def act(number: int) -> None:
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count is not None:
                with os.fdopen(os.open(count, os.O_RDWR | os.O_CREAT), "w") as stream:
                    stream.write(str(number))

        watch(save_path, act)
        code = 1
        try:
            train(settings_of(inputs, save_path), progress=SilentProgress())
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def settings_of(inputs: TinyInputs, save_path: Path) -> TrainSettings:
    """Two epochs with saves in between, pruned to the latest and the best."""
    return inputs.settings(
        run={"save_path": save_path, "epochs": 2},
        checkpoints={"checkpoint_every_steps": 3, "keep_checkpoints": 1},
        data={"num_workers": 0},
    )


def main() -> None:
    """Try kill points and print what was found as JSON."""
    inputs, every = TinyInputs(Path(sys.argv[1])), int(sys.argv[2])
    count = inputs.folder / "count"
    assert run(inputs, inputs.folder / "whole", kill_at=None, count=count) == 0
    expected = hash_file(inputs.folder / "whole" / "1" / "model.safetensors")
    num_points, failures, tried = int(count.read_text()), [], 0
    for point in range(1, num_points + 1, every):
        save_path = inputs.folder / f"killed-{point}"
        status = run(inputs, save_path, kill_at=point, count=None)
        try:
            assert status == -signal.SIGKILL, f"ended with {status}"
            for checkpoint in find_checkpoints(save_path):
                checkpoint.verify()
            status = run(inputs, save_path, kill_at=None, count=None)
            assert status == 0, f"the resumed run ended with {status}"
            final = hash_file(save_path / "1" / "model.safetensors")
            assert final == expected, "the resumed run ended in other weights"
            left = {path.name for path in save_path.iterdir() if path.name.startswith(".")}
            assert not left, f"left over: {left}"
        except AssertionError as failure:
            failures.append(f"kill point {point} of {num_points}: {failure}")
        tried += 1
    print(json.dumps({"num_points": num_points, "tried": tried, "failures": failures}))  # noqa: T201


if __name__ == "__main__":
    main()
