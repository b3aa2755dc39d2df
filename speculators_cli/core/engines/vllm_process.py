"""A process that runs vLLM: how it is started, spoken to and ended."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

CHILD_FILE = Path(__file__).with_name("vllm_child.py")
POLL_SECONDS = 1.0
END_SECONDS = 20.0  # more than the child takes to end by itself
KILL_SECONDS, KILL_POLL_SECONDS = 5.0, 0.01  # until SIGKILL
JOIN_SECONDS = 5.0  # longer only if a process has left the group with the descriptors
TAIL_LINES, TAIL_BYTES = 20, 64 * 1024
# What a launcher sets for the ranks of its own job.
LAUNCHER_NAMES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
OWN_ENVIRONMENT = {
    # An engine in a process of its own writes the last states without another step.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # the child has threads
    "VLLM_NO_USAGE_STATS": "1",
}
NO_CHANGE: Mapping[str, str] = {}
# Warnings may name errors that vLLM has passed over.
HARMLESS = re.compile(r"\b(?:WARNING|INFO|DEBUG) \d")
FIRST_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): \S.*|\berror: \S.*")


class ProcessEndedError(Exception):
    """The process has ended, or does not respond."""


class VLLMProcess:
    """A running `vllm_child.py`.

    Args:
        python: Its interpreter.
        mode: A mode of the child.
        job: What the mode needs.
        log_file: Its output is appended there.
        environment: Variables that it has in place of ours.
    """

    def __init__(
        self,
        python: Path,
        mode: str,
        job: Mapping[str, Any],
        *,
        log_file: Path,
        environment: Mapping[str, str] = NO_CHANGE,
    ) -> None:
        self.log_file = log_file
        self._is_ended = False
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        descriptor, theirs = os.pipe()
        try:
            with log_file.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 -- the user's own interpreter
                    [python, CHILD_FILE, mode, str(theirs), json.dumps(job)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs],
                    env={**child_environment(python), **environment},
                    start_new_session=True,  # a Ctrl-C is for this process; ends as one group
                )
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            os.close(theirs)
        replies = os.fdopen(descriptor, encoding="utf-8")
        self._reader = threading.Thread(target=self._read, args=(replies,), daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, request: Mapping[str, Any]) -> None:
        """Queue a request; a process that has ended is noticed by `receive`."""
        self._requests.put(json.dumps(request))

    def receive(self, *, silent_seconds: float) -> dict[str, Any]:
        """Wait for the next reply.

        Args:
            silent_seconds: Without any sign of life for so long, the process counts as hung.

        Raises:
            ProcessEndedError: It has ended, or is hung.
        """
        give_up_at = time.monotonic() + silent_seconds
        while time.monotonic() < give_up_at:
            with suppress(queue.Empty):
                reply = self._replies.get(timeout=POLL_SECONDS)
                if reply is None:
                    raise ProcessEndedError("has ended")
                if reply:
                    return reply
                give_up_at = time.monotonic() + silent_seconds
                continue
            if not self.is_alive and self._replies.empty():
                raise ProcessEndedError("has ended")
        raise ProcessEndedError(f"has not responded for {silent_seconds:g} seconds")

    def close(self, *, end_seconds: float = END_SECONDS) -> None:
        """End the process and all those it has started."""
        self._requests.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=end_seconds)
        self.kill()

    def kill(self) -> None:
        """End the process and all those it has started, at once."""
        if self._is_ended:
            return
        self._is_ended = True
        # Python's resource tracker ignores SIGTERM: it removes shared memory of those that end.
        self._signal_group(signal.SIGTERM)
        give_up_at = time.monotonic() + KILL_SECONDS
        while self._signal_group(0) and time.monotonic() < give_up_at:
            self._process.poll()  # a process that nobody has waited for counts as well
            time.sleep(KILL_POLL_SECONDS)
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        self._requests.put(None)
        self._writer.join(JOIN_SECONDS)
        self._reader.join(JOIN_SECONDS)

    def _signal_group(self, number: int) -> bool:
        """Send a signal to the process and all it has started; False if none is left."""
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with suppress(json.JSONDecodeError):  # the last line of a killed process
                    self._replies.put(json.loads(line))
        self._replies.put(None)

    def _write(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        with suppress(BrokenPipeError), stream:
            while (request := self._requests.get()) is not None:
                stream.write(request.encode() + b"\n")
                if self._requests.empty():
                    stream.flush()


def child_environment(python: Path) -> dict[str, str]:
    """Return the environment of a process under an interpreter, ours or another."""
    kept = {key: x for key, x in os.environ.items() if not LAUNCHER_NAMES.fullmatch(key)}
    if not is_own(python):  # packages of this environment would hide those of the other
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            kept.pop(name, None)
    return kept | OWN_ENVIRONMENT


def is_own(python: Path) -> bool:
    """Whether an interpreter is the one that runs this code."""
    return python.absolute() == Path(sys.executable).absolute()


def tail(log_file: Path) -> str:
    """Return the last lines of a log."""
    with log_file.open("rb") as log:
        log.seek(max(log_file.stat().st_size - TAIL_BYTES, 0))
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return "\n".join(lines[-TAIL_LINES:])


def first_error(log_file: Path, *, start: int = 0) -> str | None:
    """Return the first error in a log, from a byte on; what follows it are its consequences."""
    with log_file.open("rb") as log:
        log.seek(start)
        for line in log:
            text = line.decode("utf-8", "replace")
            if not HARMLESS.search(text) and (found := FIRST_ERROR.search(text)):
                return found[0].strip()
    return None


def run_once(python: Path, mode: str, *, log_file: Path, seconds: float) -> dict[str, Any]:
    """Return the one reply of a mode without requests.

    Raises:
        ProcessEndedError: It has ended without, or did not end.
        OSError: The interpreter cannot be started.
    """
    process = VLLMProcess(python, mode, {}, log_file=log_file)
    try:
        return process.receive(silent_seconds=seconds)
    finally:
        process.kill()
