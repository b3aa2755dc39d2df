"""One vLLM for the ranks of a machine: the first rank has it, the others reach it by a socket."""

import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from speculators_cli.core.engines.document_stream import DocumentStream, settle
from speculators_cli.core.errors import DataError, MachineError, SpeculatorsError

NAME = "vllm.socket"
ENDED = "The rank that runs vLLM has ended"


class StreamServer:
    """Lets other processes request states of a stream.

    Args:
        stream: Of this process.
        folder: For the socket; of this user only, and removed at the end.
    """

    def __init__(self, stream: DocumentStream, folder: Path) -> None:
        self._stream = stream
        self._file = folder / NAME
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._file))
        self._listener.listen()
        threading.Thread(target=self._accept, name="vllm server", daemon=True).start()

    def submit(self, input_ids: Sequence[int]) -> "Future[Path]":
        """Request the states of a document of this process."""
        return self._stream.submit(input_ids)

    def close(self) -> None:
        """End the stream; the others are told."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the wait for a connection
        self._listener.close()
        self._stream.close()
        self._file.unlink(missing_ok=True)
        with suppress(OSError):
            self._file.parent.rmdir()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        lock = threading.Lock()
        with suppress(OSError), connection, connection.makefile(encoding="utf-8") as lines:
            for line in lines:
                request = json.loads(line)
                future = self._stream.submit(request["ids"])
                future.add_done_callback(partial(_reply, connection, lock, request["number"]))


def _reply(
    connection: socket.socket, lock: threading.Lock, number: int, future: "Future[Path]"
) -> None:
    error = future.exception()
    content: dict[str, Any] = {"number": number}
    if error is None:
        content["file"] = str(future.result())
    else:
        content["message"] = getattr(error, "message", repr(error))
        content["hint"] = getattr(error, "hint", None)
        content["is_data"] = isinstance(error, DataError)
    with suppress(OSError), lock:  # the other process has ended
        connection.sendall(json.dumps(content).encode() + b"\n")
        return
    if error is None:
        future.result().unlink(missing_ok=True)


class StreamClient:
    """The stream of another process.

    Args:
        folder: Of the server, which listens already.
    """

    def __init__(self, folder: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(folder / NAME))
        self._futures: dict[int, Future[Path]] = {}
        self._num_requests = 0
        self._lock = threading.Lock()
        self._is_ended = False
        threading.Thread(target=self._read, name="vllm client", daemon=True).start()

    def submit(self, input_ids: Sequence[int]) -> "Future[Path]":
        """Request the states of a document."""
        future: Future[Path] = Future()
        with self._lock:
            number = self._num_requests
            self._num_requests += 1
            self._futures[number] = future
            request = {"number": number, "ids": list(input_ids)}
            with suppress(OSError):
                if not self._is_ended:
                    self._connection.sendall(json.dumps(request).encode() + b"\n")
                    return future
            del self._futures[number]
        settle(future, error=MachineError(ENDED))
        return future

    def close(self) -> None:
        """Leave; the stream goes on for the others."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self) -> None:
        with suppress(OSError), self._connection.makefile(encoding="utf-8") as lines:
            for line in lines:
                reply = json.loads(line)
                with self._lock:
                    future = self._futures.pop(reply["number"])
                if "file" in reply:
                    settle(future, file=Path(reply["file"]))
                else:
                    settle(future, error=_error_of(reply))
        with self._lock:
            self._is_ended = True
            left = list(self._futures.values())
            self._futures.clear()
        for future in left:
            settle(future, error=MachineError(ENDED))


def _error_of(reply: dict[str, Any]) -> SpeculatorsError:
    kind = DataError if reply["is_data"] else MachineError
    return kind(reply["message"], hint=reply["hint"])
