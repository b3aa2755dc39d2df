"""VLLMRunner: vLLM in a process of its own, loaded when needed, and once more if it dies."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from speculators_cli.core.engines.vllm_process import (
    ProcessEndedError,
    VLLMProcess,
    first_error,
    tail,
)
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import find_python
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import format_bytes

CAPTURE = "capture"  # a mode of the child
LOAD_SECONDS = 3600.0
FILE_POLL_SECONDS = 0.001
SHARED_DIR = Path("/dev/shm")  # noqa: S108 -- a folder of our own is made in it
# States of a packed sequence: 8192 tokens, 4 layers, 8192 hidden, 2 bytes are 0.5 GiB.
SHARED_BYTES = 2 * 2**30
FAILED = ".failed"  # as in vllm_connector.py


class VLLMRunner:
    """Starts and ends the process; errors have the reason from its log, which is then kept.

    Args:
        setup: The verifier, and how vLLM is started.
        flags: All flags of the engine.
        name: What is loaded, for messages; the verifier if None.
        silent_seconds: Without a sign of life for so long, a working engine counts as hung.
    """

    def __init__(
        self, setup: VLLMSetup, flags: list[str], *, name: str | None = None, silent_seconds: float
    ) -> None:
        self._name = name or f"`{setup.verifier}`"
        self._python = find_python(setup.python)
        self._environment = setup.environment
        self._flags = flags
        self._silent_seconds = silent_seconds
        self._process: VLLMProcess | None = None
        self._mode = ""
        self._log_start = 0
        self._num_restarts = 0
        self._log_dir: Path | None = None
        self._states_dir: Path | None = None

    def open(self, mode: str, **job: Any) -> VLLMProcess:
        """Return the process in this mode; load it if it is not running, or in another mode.

        Raises:
            MachineError: vLLM cannot load the verifier.
        """
        if self._process is not None and self._mode == mode:
            return self._process
        self.stop()
        if self._log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="speculators-vllm-"))
        job["flags"] = self._flags
        if mode == CAPTURE:
            self._states_dir = _make_states_dir()
            job["states_dir"] = str(self._states_dir)
        log_file = self._log_dir / f"{mode}.log"
        self._log_start = log_file.stat().st_size if log_file.exists() else 0
        process = VLLMProcess(
            self._python, mode, job, log_file=log_file, environment=self._environment
        )
        self._process, self._mode = process, mode
        try:
            process.receive(silent_seconds=LOAD_SECONDS)
        except ProcessEndedError as error:
            process.kill()  # so that the log is complete
            reason = self.explain(f"it {error}")
            raise self.failed(f"vLLM cannot load {self._name}: {reason}") from None
        except BaseException:
            process.kill()  # while it loads it would end late by itself
            raise
        return process

    def receive(self) -> dict[str, Any]:
        """Wait for the next reply.

        Raises:
            ProcessEndedError: The process has ended, or is hung.
        """
        assert self._process is not None, "it is open"
        return self._process.receive(silent_seconds=self._silent_seconds)

    def recover(self, error: ProcessEndedError) -> None:
        """End a process that has failed, so that `open` starts another one; possible once.

        Raises:
            MachineError: It is the second time.
        """
        if self._process is not None:
            self._process.kill()
        if self._num_restarts:
            found = self.explain("")
            reason = f"{error}, for the second time" + (f": {found}" if found else "")
            raise self.failed(f"vLLM {reason}") from None
        self._num_restarts += 1
        self.stop()

    def explain(self, otherwise: str) -> str:
        """Return the first error of the process's log, if there is one."""
        assert self._process is not None, "it was open"
        return first_error(self._process.log_file, start=self._log_start) or otherwise

    def failed(self, message: str) -> MachineError:
        """Return an error with the end of the log, after the process is ended."""
        assert self._process is not None, "it was open"
        log_file = self._process.log_file
        self.stop()
        self._log_dir = None  # kept
        lines = tail(log_file)
        return MachineError(
            f"{message}\n{lines}" if lines else message,
            hint=f"See the whole log, `{log_file}`; change the engine with `--vllm-args`",
        )

    def wait_for(self, file: Path) -> None:
        """Wait until the states of a document are written.

        Raises:
            ProcessEndedError: The process has ended before.
            MachineError: They cannot be written.
        """
        assert self._process is not None, "it is open"
        failed = file.with_name(file.name + FAILED)
        give_up_at = time.monotonic() + self._silent_seconds
        while not file.exists():
            if failed.is_symlink():
                free = format_bytes(shutil.disk_usage(file.parent).free)
                raise self.failed(
                    f"vLLM cannot write hidden states to `{file.parent}`, {free} free: "
                    f"{failed.readlink()}"
                )
            if not self._process.is_alive or time.monotonic() > give_up_at:
                raise ProcessEndedError("has ended without the hidden states of a document")
            time.sleep(FILE_POLL_SECONDS)

    def stop(self) -> None:
        """End the process and remove its states; it can be opened again."""
        process, self._process = self._process, None
        if process is not None:
            process.close()
        if self._states_dir is not None:
            shutil.rmtree(self._states_dir, ignore_errors=True)
            self._states_dir = None

    def close(self) -> None:
        """End the process and remove its files; the log of a failure is kept."""
        self.stop()
        if self._log_dir is not None:
            shutil.rmtree(self._log_dir, ignore_errors=True)
            self._log_dir = None


def _make_states_dir() -> Path:
    is_usable = SHARED_DIR.is_dir() and shutil.disk_usage(SHARED_DIR).free >= SHARED_BYTES
    parent = SHARED_DIR if is_usable else None
    return Path(tempfile.mkdtemp(prefix="speculators-vllm-states-", dir=parent))
