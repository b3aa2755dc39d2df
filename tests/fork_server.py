"""Programs in forks of one process that has imported everything: a start takes no seconds.

A process that has computed has threads, which its forks lack. So the server is a program of its own
that only imports and forks.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from tempfile import TemporaryDirectory
from typing import Any

from tests.ranks import Environment, choose_port, torchrun
from tests.speed import speed_up

IMPORTED = (  # before the forks
    "speculators_cli.core.bench.bench",
    "speculators_cli.core.capture.generate",
    "speculators_cli.core.evaluated_training",
    "speculators_cli.core.export.export",
    "speculators_cli.core.preparation.conversion",
    "transformers.models.llama.modeling_llama",
)


class ForkServer:
    """Runs programs, one after another; started with the first of them."""

    def __init__(self) -> None:
        self._process: Popen[str] | None = None
        self._environment = {**os.environ}  # not as a test has changed it

    def run(self, program: str, *arguments: object, num_ranks: int = 1) -> CompletedProcess[str]:
        """Run a program on one rank, or on several as torchrun does.

        Args:
            program: A module, as after `python -m`, or the path of a file.
            arguments: Its command line.
            num_ranks: Processes.

        Returns:
            The first exit code other than 0, and the output of all ranks.
        """
        port = choose_port()
        ranks = range(num_ranks) if num_ranks > 1 else ()
        argv = [program, *map(str, arguments)]
        with TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            codes = self._request(
                argv=argv,
                environment={**os.environ},
                places=[torchrun(rank, num_ranks, port) for rank in ranks] or [{}],
                outputs=[str(out), str(err)],
            )
            code = next(filter(None, codes), 0)
            return CompletedProcess(argv, code, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            with self._process:  # closes its input, and waits
                pass

    def _request(self, **content: Any) -> list[int]:
        if self._process is None:
            command = [sys.executable, "-m", "tests.fork_server"]
            root = Path(__file__).parents[1]
            self._process = Popen(
                command, stdin=PIPE, stdout=PIPE, text=True, cwd=root, env=self._environment
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(content) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        assert reply, "the server has ended"
        codes: list[int] = json.loads(reply)
        return codes


def serve() -> None:
    """Run what is asked for on stdin, until it ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    speed_up()
    gc.collect()
    gc.freeze()  # pages of old objects stay shared with the forks
    for line in sys.stdin:
        request = json.loads(line)
        environment, outputs = request["environment"], request["outputs"]
        pids = [start(request["argv"], environment | place, outputs) for place in request["places"]]
        print(json.dumps(wait_for(pids)), flush=True)  # noqa: T201


def start(argv: Sequence[str], environment: Environment, outputs: Sequence[str]) -> int:
    """Fork a process that runs a program; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in enumerate(outputs, 1):
        os.dup2(os.open(file, flags), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*argv]
    code: object = 1
    try:
        if argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def wait_for(pids: Sequence[int]) -> list[int]:
    """Exit codes in the order in which the processes end; after a failure, others are killed."""
    left, codes = set(pids), []
    while left:
        pid, status = os.wait()
        left.remove(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking torch apart takes a second
