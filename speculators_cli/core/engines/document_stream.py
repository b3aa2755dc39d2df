"""Hidden states of documents that vLLM computes while the caller does something else."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from speculators_cli.core.engines.captured_layers import CapturedLayers
from speculators_cli.core.engines.vllm_engine import (
    CAPTURE_SAMPLING,
    SILENT_SECONDS,
    engine_flags,
    refusal,
)
from speculators_cli.core.engines.vllm_process import ProcessEndedError, VLLMProcess
from speculators_cli.core.engines.vllm_runner import CAPTURE, VLLMRunner
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import MachineError, SpeculatorsError

JOIN_SECONDS = 30.0
ENDED = "vLLM has been ended"


class DocumentStream(Protocol):
    """Takes documents, and gives back files of their hidden states."""

    def submit(self, input_ids: Sequence[int]) -> "Future[Path]":
        """Request the states of a document; the result is a file, for the caller to remove."""

    def close(self) -> None:
        """End what computes them."""


class VLLMStream:
    """Keeps vLLM busy with all documents that are requested, in their order.

    vLLM is loaded with the first one. If its process dies, it is started again once, and what it
    had not finished is requested again in the same order.

    Args:
        setup: The verifier, and how vLLM is started.
        layers: Whose states are written.
        silent_seconds: Without a sign of life for so long, a working engine counts as hung.
    """

    def __init__(
        self, setup: VLLMSetup, layers: CapturedLayers, *, silent_seconds: float = SILENT_SECONDS
    ) -> None:
        self._verifier = setup.verifier
        self._layers = layers
        self._runner = VLLMRunner(setup, engine_flags(setup), silent_seconds=silent_seconds)
        self._process: VLLMProcess | None = None  # once it is loaded
        self._requests: dict[int, dict[str, Any]] = {}  # that are not finished, in order
        self._futures: dict[int, Future[Path]] = {}
        self._num_requests = 0
        self._error: BaseException | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, input_ids: Sequence[int]) -> "Future[Path]":
        """Request the states of a document.

        Returns:
            A file. Fails with a `MachineError` if vLLM cannot be loaded or has failed twice, and
            with a `DataError` if it refuses the document.
        """
        future: Future[Path] = Future()
        with self._changed:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            index = self._num_requests
            self._num_requests += 1
            request = {"index": index, "ids": list(input_ids), "sampling": CAPTURE_SAMPLING}
            self._requests[index], self._futures[index] = request, future
            if self._process is not None:
                self._process.send(request)
            self._changed.notify()
        return future

    def close(self) -> None:
        """End vLLM; what is not finished fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._runner.close()
        self._thread.join(JOIN_SECONDS)
        self._fail(MachineError(ENDED))

    def _run(self) -> None:
        try:
            while self._wait_for_requests():
                try:
                    self._finish_one()
                except ProcessEndedError as error:
                    if self._is_closed:
                        return
                    with self._changed:
                        self._process = None
                    self._runner.recover(error)
        except BaseException as error:
            self._fail(MachineError(ENDED) if self._is_closed else error)
            if not isinstance(error, SpeculatorsError) and not self._is_closed:
                raise

    def _wait_for_requests(self) -> bool:
        """Wait until there is something to do; False if it is the end."""
        with self._changed:
            while not self._requests and not self._is_closed:
                self._changed.wait()
            return not self._is_closed

    def _finish_one(self) -> None:
        """Wait for the next reply, of whichever document."""
        if self._process is None:
            process = self._runner.open(CAPTURE, layer_ids=self._layers.ids)
            with self._changed:
                self._process = process
                for request in self._requests.values():
                    process.send(request)
        reply = self._runner.receive()
        index: int = reply["index"]
        file = None
        if "refused" not in reply:
            file = Path(reply["file"])
            self._runner.wait_for(file)
        with self._changed:
            del self._requests[index]
            future = self._futures.pop(index)
        if file is None:
            settle(future, error=refusal(self._verifier, reply["refused"]))
        else:
            settle(future, file=file)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            futures = list(self._futures.values())
            self._requests.clear()
            self._futures.clear()
        for future in futures:
            settle(future, error=self._error)


def settle(
    future: "Future[Path]", *, file: Path | None = None, error: BaseException | None = None
) -> None:
    """Set the result of a future; the file of one that nobody waits for is removed."""
    if not future.set_running_or_notify_cancel():
        if file is not None:
            file.unlink(missing_ok=True)
    elif file is not None:
        future.set_result(file)
    else:
        future.set_exception(error)
