"""Heartbeats of the ranks: which of them are missing, and whether the launcher still runs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from speculators_cli.core.errors import MachineError, SpeculatorsError, StoppedError
from speculators_cli.core.place import Place
from speculators_cli.core.signals import Interrupted, StopSignals
from speculators_cli.core.training.rank_store import (
    POLL_SECONDS,
    RankFailure,
    RankStore,
    read_failures,
    read_key,
    run_within,
    write_failure,
)

HEARTBEAT_SECONDS = 1.0
# Every rank whose wait ended in an error records it within this time, and every live rank sends
# another heartbeat.
GRACE_SECONDS = 4.0


class CollectiveError(RuntimeError):
    """A collective failed or timed out; which rank is missing is not known yet."""


class LostRanksError(MachineError):
    """Other ranks failed, died or hang, so this one cannot continue."""


@dataclass
class _Others:
    """The state of the other ranks."""

    failed: Mapping[int, RankFailure] = field(default_factory=dict)
    stranded: set[int] = field(default_factory=set)  # their wait ended in an error, too
    alive: set[int] = field(default_factory=set)  # sent another heartbeat
    num_passed: dict[int, int] = field(default_factory=dict)  # collectives entered


class RankWatch:
    """Publishes the progress of this rank, and finds out which other ranks are missing.

    A thread writes heartbeats to the store. A rank whose wait ends in an error records that, too;
    the missing ranks are those that neither wait nor failed.

    Args:
        place: This process.
        timeout_seconds: Maximum wait for a rank.
        signals: Receives a stop request if the launcher of this process is gone.
        end: Reports an error and ends the process, where the error cannot be raised in the run.
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
        self.num_passed = 0  # collectives entered
        self.waits_since: float | None = None  # start of a wait that has no timeout of its own
        self._has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self._connections = RankStore(place)
        self._answered_at = time.monotonic()
        self.store = self._connections.connect(timedelta(seconds=timeout_seconds))
        self._parent = os.getppid()
        self._is_done = threading.Event()

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.place.num_ranks) if rank != self.place.rank]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Send heartbeats within the block, and turn a communication error into a LostRanksError.

        Raises:
            LostRanksError: Other ranks are missing.
        """
        for work in (self._send_heartbeats, self._check_waits):
            threading.Thread(target=work, daemon=True).start()
        try:
            yield
        except BaseException as error:
            if is_communication(error):
                raise self.find_lost(str(error)) from None
            self._record_failure(error)
            raise
        finally:
            self._is_done.set()

    def passed(self) -> None:
        """Count a collective; called before it."""
        self.num_passed += 1
        if self.waits_since is not None:
            self.waits_since = time.monotonic()

    @contextmanager
    def ending_when_stuck(self) -> Iterator[None]:
        """End the process if the device waits for other ranks in vain, which raises no error."""
        self.waits_since = time.monotonic()
        try:
            yield
        finally:
            self.waits_since = None

    def wait_for(self, name: str, timeout: timedelta) -> None:
        """Wait until rank 0 has set a key, as long as it sends heartbeats.

        Raises:
            LostRanksError: Rank 0 failed, died or hangs.
        """
        until, latest, latest_at = time.monotonic() + timeout.total_seconds(), b"", time.monotonic()
        with self._needing_store():
            while not self.store.check([name]):
                self._raise_failed([0])
                heartbeat = read_key(self.store, "beat/0")
                if heartbeat != latest:
                    latest, latest_at = heartbeat, time.monotonic()
                now = time.monotonic()
                if now - latest_at > self.timeout_seconds or now > until:
                    raise _lost([0], f"no sign of life for {self.timeout_seconds:,} s")
                time.sleep(POLL_SECONDS)

    def gather(self) -> None:
        """Wait until all ranks have started, before the process group exists.

        Raises:
            LostRanksError: Some failed or did not join.
        """
        until = time.monotonic() + self.timeout_seconds
        with self._needing_store():
            self.store.set(f"here/{self.place.rank}", "")
            missing = self.others
            while missing := [k for k in missing if not self.store.check([f"here/{k}"])]:
                self._raise_failed(missing)
                if time.monotonic() > until:
                    raise _lost(missing, f"did not join within {self.timeout_seconds:,} s")
                time.sleep(POLL_SECONDS)

    def find_lost(self, reason: str) -> LostRanksError:
        """Return the error that lists the missing ranks, after a wait in vain."""
        others = run_within(2 * GRACE_SECONDS, self._observe_others)
        if others is None:
            return self._store_lost()
        if others.failed:
            return _failed(others.failed)
        missing = [rank for rank in self.others if rank not in others.stranded]
        silent = [rank for rank in missing if rank not in others.alive]
        if silent:
            return _lost(silent, "died or hangs: no sign of life")
        # On a GPU, a rank that hangs finds out by itself, too, that it waits in vain.
        entered = others.num_passed | {self.place.rank: self.num_passed}
        late = find_behind(entered, missing) or missing or find_behind(entered, entered)
        if late:
            return _lost(late, f"did not arrive within {self.timeout_seconds:,} s")
        return LostRanksError(
            f"The ranks lost their connections to each other: {reason}",
            hint="Check the network between them, then rerun the same command to resume",
        )

    def _observe_others(self) -> _Others:
        store, others = self._connections.connect(), _Others()
        store.set(f"stranded/{self.place.rank}", "")
        before = {rank: read_key(store, f"beat/{rank}") for rank in self.others}
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and len(others.stranded) < len(self.others):
            others.failed = read_failures(store, self.others)
            if others.failed:
                break
            others.stranded = {k for k in self.others if store.check([f"stranded/{k}"])}
            time.sleep(POLL_SECONDS)
        for rank in self.others:
            heartbeat = read_key(store, f"beat/{rank}")
            if heartbeat:
                others.num_passed[rank] = int(heartbeat.split()[1])
            if heartbeat != before[rank]:
                others.alive.add(rank)
        store.set(f"heard/{self.place.rank}", "")
        if self._connections.is_hosted_here:
            # After a failure, the others may not have noticed it yet.
            coming = set(self.others) - others.failed.keys() if others.failed else others.stranded
            _keep_open(store, coming, until=until + GRACE_SECONDS / 2)
        return others

    def _send_heartbeats(self) -> None:
        """Send heartbeats until the block ends or the store is gone."""
        count = 0
        try:
            store = self._connections.connect()
            while not self._is_done.is_set():
                count += 1
                store.set(f"beat/{self.place.rank}", f"{count} {self.num_passed}")
                store.check(["beat/0"])
                self._answered_at = time.monotonic()
                self._is_done.wait(HEARTBEAT_SECONDS)
        except (RuntimeError, SpeculatorsError):
            self._end_without_launcher()

    def _check_waits(self) -> None:
        """Detect that the launcher or the store is gone, or that this rank waits in vain."""
        while not self._is_done.wait(HEARTBEAT_SECONDS):
            if self._has_launcher and os.getppid() != self._parent:
                self._end_without_launcher()
                return
            # Later than an error of the run itself, whose message is more precise.
            if time.monotonic() - self._answered_at > self.timeout_seconds + 2.5 * GRACE_SECONDS:
                self.end(self._store_lost())
            since = self.waits_since
            if since and time.monotonic() - since > self.timeout_seconds + GRACE_SECONDS:
                self.end(self.find_lost("a collective did not finish"))

    def _end_without_launcher(self) -> None:
        """Request a stop, as the launcher would have; end the process if that has no effect."""
        if self._has_launcher and not self.signals.received and not self._is_done.is_set():
            self.signals.request(signal.SIGTERM)
        if not self._is_done.wait(self.timeout_seconds):
            self.end(self._store_lost())

    def _record_failure(self, error: BaseException) -> None:
        if isinstance(error, StoppedError | LostRanksError):  # occurs on the other ranks, too
            return
        code = getattr(error, "exit_code", 1)
        if isinstance(error, Interrupted):
            code = 128 + error.signal_number
        failure = RankFailure(getattr(error, "message", f"{type(error).__name__}: {error}"), code)

        def record() -> None:
            write_failure(self._connections.connect(), self.place.rank, failure)

        run_within(GRACE_SECONDS, record)

    def _raise_failed(self, ranks: list[int]) -> None:
        failed = read_failures(self.store, ranks)
        if failed:
            raise _failed(failed)

    @contextmanager
    def _needing_store(self) -> Iterator[None]:
        """Turn an error of the store into one of its host."""
        try:
            yield
        except RuntimeError:
            raise LostRanksError(
                f"{self._connections.host} ended before the first step",
                hint="Check its error messages",
            ) from None

    def _store_lost(self) -> LostRanksError:
        return LostRanksError(
            f"{self._connections.host} died or hangs: it does not answer",
            hint="Rerun the same command to resume",
        )


def find_behind(num_passed: Mapping[int, int], candidates: Iterable[int]) -> list[int]:
    """The candidates that have entered fewer collectives than another rank."""
    most = max(num_passed.values())
    return sorted(rank for rank in candidates if num_passed.get(rank, most) < most)


def is_communication(error: BaseException) -> bool:
    """Whether an error was raised by a collective, which does not report the missing rank."""
    if isinstance(error, CollectiveError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in ("gloo", "NCCL"))


def _keep_open(store: Any, ranks: set[int], *, until: float) -> None:
    """Wait until the other ranks have read the store, which ends with this process."""
    while time.monotonic() < until and not all(store.check([f"heard/{k}"]) for k in ranks):
        time.sleep(POLL_SECONDS)


def _failed(failed: Mapping[int, RankFailure]) -> LostRanksError:
    rank = min(failed)
    error = LostRanksError(
        f"Rank {rank} failed: {failed[rank].message}",
        hint=f"Check the error messages of rank {rank}",
    )
    error.exit_code = failed[rank].exit_code
    return error


def _lost(ranks: list[int], problem: str) -> LostRanksError:
    names = f"Rank {ranks[0]}" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))}"
    return LostRanksError(
        f"{names} {problem}",
        hint="Check the machine of that rank, raise `--timeout-seconds` if it was only slow, "
        "then rerun the same command to resume",
    )
