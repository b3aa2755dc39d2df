"""The key-value store that all ranks share: its host, connections to it, its records of errors."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from speculators_cli.core.errors import MachineError, SpeculatorsError
from speculators_cli.core.place import Place

T = TypeVar("T")

POLL_SECONDS = 0.1
REQUEST_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class RankFailure:
    """The error that ended another rank."""

    message: str
    exit_code: int


class RankStore:
    """Connections to the store, which runs in the launcher or in rank 0.

    Args:
        place: This process.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._is_in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._has_connected = False

    @property
    def host(self) -> str:
        """The process that runs the store, as the subject of a message."""
        return "The launcher" if self._is_in_launcher else "Rank 0"

    @property
    def is_hosted_here(self) -> bool:
        """Whether the store ends with this process."""
        return self.place.rank == 0 and not self._is_in_launcher

    def connect(self, timeout: timedelta = REQUEST_TIMEOUT) -> Any:
        """Open a connection; the first one of rank 0 starts the store, unless the launcher has.

        Raises:
            MachineError: The store cannot be reached, or its port is in use.
        """
        place = self.place
        is_server = self.is_hosted_here and not self._has_connected
        try:
            if not is_server:
                self._wait_until_reachable(timeout.total_seconds())
            store = dist.TCPStore(  # type: ignore[attr-defined]
                *(place.address, place.port, None, is_server, timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, OSError) as error:
            where = f"`{place.address}:{place.port}`"
            problem = (
                f"Rank 0 cannot listen on {where}"
                if is_server
                else f"{self.host} does not answer at {where}"
            )
            raise MachineError(
                f"{problem}: {str(error).splitlines()[0]}",
                hint="Check `MASTER_ADDR` and `MASTER_PORT`, the same on all ranks, and rank 0",
            ) from None
        self._has_connected = True
        # After an elastic restart, the store may still hold the keys of the previous attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]

    def _wait_until_reachable(self, seconds: float) -> None:
        """Retry until the port accepts connections; unlike in TCPStore, signals are handled."""
        until = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((self.place.address, self.place.port), 5.0).close()
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return


def read_key(store: Any, name: str) -> bytes:
    """Return the value of a key; empty if it is not set."""
    return bytes(store.get(name)) if store.check([name]) else b""


def write_failure(store: Any, rank: int, failure: RankFailure) -> None:
    """Record the error that ends this rank, for the others."""
    store.set(f"failed/{rank}", json.dumps(asdict(failure)))


def read_failures(store: Any, ranks: Iterable[int]) -> Mapping[int, RankFailure]:
    """Return the recorded errors of those of the ranks that failed."""
    texts = {rank: read_key(store, f"failed/{rank}") for rank in ranks}
    return {rank: RankFailure(**json.loads(text)) for rank, text in texts.items() if text}


def run_within(seconds: float, work: Callable[[], T]) -> T | None:
    """Return the result of `work`, or None if the store fails or does not answer in time."""
    results: list[T] = []

    def run() -> None:
        with suppress(RuntimeError, SpeculatorsError):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
