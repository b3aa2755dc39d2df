"""Who is missing where ranks wait for each other, and whether their launcher is still there."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from speculators_cli.core.errors import MachineError, SpeculatorsError, StoppedError
from speculators_cli.core.signals import Interrupted, StopSignals
from speculators_cli.core.training.place import Place

T = TypeVar("T")

BEAT_SECONDS = 1.0  # between two signs of life of a rank
# Ranks that wait in vain are heard of within this time, and a rank that lives has another beat.
GRACE_SECONDS = 4.0
POLL_SECONDS = 0.1
STORE_ANSWERS_WITHIN = timedelta(seconds=30)


class CollectiveError(RuntimeError):
    """A collective did not end well; who is missing is not known yet."""


class LostRanksError(MachineError):
    """Other ranks failed, died or hang, so this one cannot go on."""


@dataclass
class _Heard:
    """What one rank heard of the others."""

    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    stranded: set[int] = field(default_factory=set)  # wait as this one does
    alive: dict[int, int] = field(default_factory=dict)  # the others that live: places passed


class RankWatch:
    """Tells the others that this rank lives and how far it is, and hears it of them.

    A thread beats in the store. A rank whose waiting ends in an error tells so, too; ranks that
    then neither wait nor fail are those that are missing.

    Args:
        place: This process.
        timeout_seconds: A rank may be waited for that long.
        signals: Asked to stop the run when the launcher of this process is gone.
        end: Tells of an error and ends the process, where no error reaches the work.
    """

    def __init__(
        self,
        place: Place,
        *,
        timeout_seconds: int,
        signals: StopSignals,
        end: Callable[[SpeculatorsError], None],
    ) -> None:
        self.place = place
        self.timeout_seconds = timeout_seconds
        self.signals = signals
        self.end = end
        self.num_passed = 0  # places where all ranks meet
        self.waits_since: float | None = None  # where a wait that nothing else ends is watched
        self._has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self._has_store = False
        self._answered_at = time.monotonic()
        self.store = self.open_store(timedelta(seconds=timeout_seconds))
        self._parent = os.getppid()
        self._is_done = threading.Event()

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.place.num_ranks) if rank != self.place.rank]

    @property
    def _store_host(self) -> str:
        return "The launcher" if _is_agent_store() else "Rank 0"

    @property
    def hosts_store(self) -> bool:
        """Whether the store ends with this process."""
        return self.place.rank == 0 and not _is_agent_store()

    def open_store(self, timeout: timedelta) -> Any:
        """Connect to the store; rank 0 opens it first, unless the launcher has.

        Raises:
            MachineError: It cannot be reached, or its port is taken.
        """
        place = self.place
        is_first = self.hosts_store and not self._has_store
        try:
            if not is_first:
                self._reach_store(timeout.total_seconds())
            store = dist.TCPStore(  # type: ignore[attr-defined]
                *(place.address, place.port, None, is_first, timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, OSError) as error:
            where = f"`{place.address}:{place.port}`"
            problem = (
                f"Rank 0 cannot listen on {where}"
                if is_first
                else f"{self._store_host} does not answer at {where}"
            )
            raise MachineError(
                f"{problem}: {str(error).splitlines()[0]}",
                hint="Check `MASTER_ADDR` and `MASTER_PORT`, the same on all ranks, and rank 0",
            ) from None
        self._has_store = True
        # An elastic restart may find the store of the attempt before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]

    def _reach_store(self, seconds: float) -> None:
        """Try until it answers; a signal is heard meanwhile, which TCPStore does not do."""
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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Beat within the block; an error of the communication becomes one of the missing ranks.

        Raises:
            LostRanksError: Other ranks are missing.
        """
        for work in (self._beat, self._look_after):
            threading.Thread(target=work, daemon=True).start()
        try:
            yield
        except BaseException as error:
            if is_communication(error):
                raise self.find_lost(str(error)) from None
            self._tell_failure(error)
            raise
        finally:
            self._is_done.set()

    def passed(self) -> None:
        """Count a place where all ranks meet; called on the way in."""
        self.num_passed += 1
        if self.waits_since is not None:
            self.waits_since = time.monotonic()

    @contextmanager
    def ending_when_stuck(self) -> Iterator[None]:
        """End where the device waits for other ranks in vain: no error comes of that."""
        self.waits_since = time.monotonic()
        try:
            yield
        finally:
            self.waits_since = None

    def wait_for(self, name: str, timeout: timedelta) -> None:
        """Wait until rank 0 has set a key, as long as it lives.

        Raises:
            LostRanksError: Rank 0 failed, died or hangs.
        """
        until, beat, heard_at = time.monotonic() + timeout.total_seconds(), b"", time.monotonic()
        with self._answering():
            while not self.store.check([name]):
                self._raise_failed([0])
                new = self._read(self.store, "beat/0")
                if new != beat:
                    beat, heard_at = new, time.monotonic()
                now = time.monotonic()
                if now - heard_at > self.timeout_seconds or now > until:
                    raise self._lost([0], f"no sign of life for {self.timeout_seconds:,} s")
                time.sleep(POLL_SECONDS)

    def gather(self) -> None:
        """Wait until all ranks are here, before there is anything else to wait with.

        Raises:
            LostRanksError: Some failed or did not come.
        """
        until = time.monotonic() + self.timeout_seconds
        with self._answering():
            self.store.set(f"here/{self.place.rank}", "")
            missing = self.others
            while missing := [k for k in missing if not self.store.check([f"here/{k}"])]:
                self._raise_failed(missing)
                if time.monotonic() > until:
                    raise self._lost(missing, f"did not join within {self.timeout_seconds:,} s")
                time.sleep(POLL_SECONDS)

    def find_lost(self, reason: str) -> LostRanksError:
        """The error that has the ranks that are missing, after waiting in vain."""
        heard = _within(2 * GRACE_SECONDS, self._hear)
        if heard is None:
            return self._gone()
        if heard.failed:
            return _failure(heard.failed)
        missing = [rank for rank in self.others if rank not in heard.stranded]
        silent = [rank for rank in missing if rank not in heard.alive]
        if silent:
            return self._lost(silent, "died or hangs: no sign of life")
        behind = [rank for rank in missing if heard.alive[rank] < self.num_passed]
        if behind or missing:
            return self._lost(
                behind or missing, f"did not arrive within {self.timeout_seconds:,} s"
            )
        return LostRanksError(
            f"The ranks lost touch with each other: {reason}",
            hint="Check the network between them, then run the same command again to go on",
        )

    def _hear(self) -> _Heard:
        store, heard = self.open_store(STORE_ANSWERS_WITHIN), _Heard()
        store.set(f"stranded/{self.place.rank}", "")
        before = {rank: self._read(store, f"beat/{rank}") for rank in self.others}
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and len(heard.stranded) < len(self.others):
            heard.failed = self._read_failed(store, self.others)
            if heard.failed:
                break
            heard.stranded = {k for k in self.others if store.check([f"stranded/{k}"])}
            time.sleep(POLL_SECONDS)
        for rank in self.others:
            beat = self._read(store, f"beat/{rank}")
            if beat != before[rank]:
                heard.alive[rank] = int(beat.split()[1])
        store.set(f"heard/{self.place.rank}", "")
        if self.hosts_store:
            # After a failure the others may not have come to hear of it yet.
            coming = set(self.others) - heard.failed.keys() if heard.failed else heard.stranded
            self._linger(store, coming, until=until + GRACE_SECONDS / 2)
        return heard

    def _linger(self, store: Any, ranks: set[int], *, until: float) -> None:
        """Keep the store until the others have heard, too."""
        while time.monotonic() < until and not all(store.check([f"heard/{k}"]) for k in ranks):
            time.sleep(POLL_SECONDS)

    def _beat(self) -> None:
        """Show that this process lives, until who has the store is gone."""
        count = 0
        try:
            store = self.open_store(STORE_ANSWERS_WITHIN)
            while not self._is_done.is_set():
                count += 1
                store.set(f"beat/{self.place.rank}", f"{count} {self.num_passed}")
                store.check(["beat/0"])
                self._answered_at = time.monotonic()
                self._is_done.wait(BEAT_SECONDS)
        except (RuntimeError, SpeculatorsError):
            self._end_alone()

    def _look_after(self) -> None:
        """Notice that the launcher is gone, or that this rank waits in vain."""
        while not self._is_done.wait(BEAT_SECONDS):
            if self._has_launcher and os.getppid() != self._parent:
                self._end_alone()
                return
            # Later than an error of the work itself, which has more to tell.
            if time.monotonic() - self._answered_at > self.timeout_seconds + 2.5 * GRACE_SECONDS:
                self.end(self._gone())
            since = self.waits_since
            if since and time.monotonic() - since > self.timeout_seconds + GRACE_SECONDS:
                self.end(self.find_lost("a collective did not end"))

    def _end_alone(self) -> None:
        """Stop as a launcher that is gone would have done; end where that does not help."""
        if self._has_launcher and not self.signals.received and not self._is_done.is_set():
            self.signals.request(signal.SIGTERM)
        if not self._is_done.wait(self.timeout_seconds):
            self.end(self._gone())

    def _tell_failure(self, error: BaseException) -> None:
        if isinstance(error, StoppedError | LostRanksError):  # the others meet it themselves
            return
        code = getattr(error, "exit_code", 1)
        if isinstance(error, Interrupted):
            code = 128 + error.signal_number
        message = getattr(error, "message", f"{type(error).__name__}: {error}")

        def tell() -> None:
            text = json.dumps({"message": message, "exit_code": code})
            self.open_store(STORE_ANSWERS_WITHIN).set(f"failed/{self.place.rank}", text)

        _within(GRACE_SECONDS, tell)

    def _raise_failed(self, ranks: list[int]) -> None:
        failed = self._read_failed(self.store, ranks)
        if failed:
            raise _failure(failed)

    @staticmethod
    def _read(store: Any, name: str) -> bytes:
        return bytes(store.get(name)) if store.check([name]) else b""

    def _read_failed(self, store: Any, ranks: list[int]) -> dict[int, dict[str, Any]]:
        texts = {rank: self._read(store, f"failed/{rank}") for rank in ranks}
        return {rank: json.loads(text) for rank, text in texts.items() if text}

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Where the store is asked while nothing else is: it ends with who has it."""
        try:
            yield
        except RuntimeError:
            raise LostRanksError(
                f"{self._store_host} ended before the first step", hint="See its messages"
            ) from None

    def _gone(self) -> LostRanksError:
        return LostRanksError(
            f"{self._store_host} died or hangs: it does not answer",
            hint="Run the same command again to go on",
        )

    def _lost(self, ranks: list[int], what: str) -> LostRanksError:
        return LostRanksError(
            f"{_name(ranks)} {what}",
            hint="Check the machine of that rank, raise `--timeout-seconds` if it was only slow, "
            "then run the same command again to go on",
        )


def is_communication(error: BaseException) -> bool:
    """Whether an error is one of the collectives, which does not have who is missing."""
    if isinstance(error, CollectiveError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in ("gloo", "NCCL"))


def _failure(failed: dict[int, dict[str, Any]]) -> LostRanksError:
    rank, failure = min(failed.items())
    error = LostRanksError(
        f"Rank {rank} failed: {failure['message']}", hint=f"See the messages of rank {rank}"
    )
    error.exit_code = failure["exit_code"]
    return error


def _name(ranks: list[int]) -> str:
    return f"Rank {ranks[0]}" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))}"


def _is_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` gives, or None where the store does not answer in time, or is gone."""
    results: list[T] = []

    def run() -> None:
        with suppress(RuntimeError, SpeculatorsError):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
