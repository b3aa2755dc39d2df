"""Handling of stop signals."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A launcher may pass on a Ctrl-C that the terminal has already sent to the processes.
SAME_PRESS_SECONDS = 0.5


class Interrupted(BaseException):
    """A stop signal was received; raised where the work can be interrupted at any line.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopSignals:
    """Interrupts the work at the first stop signal while entered; a second Ctrl-C exits at once.

    After `defer` the signal is only recorded, to be checked at the next safe point. An ignored
    SIGHUP, as with `nohup`, stays ignored. Signals are delivered to the main thread only: in other
    threads this does nothing.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._received_at = 0.0
        self._is_deferred = False
        self._old: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in STOP_SIGNALS if not _stays_ignored(number)]
            self._old = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def request(self, number: signal.Signals) -> None:
        """Act as if a signal was received; callable from any thread."""
        if self._old:
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received = number

    def defer(self) -> None:
        """Record signals from here on instead of interrupting."""
        self._is_deferred = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Interrupt the block at a signal, including an earlier one, even after `defer`.

        Raises:
            Interrupted: A signal was received.
        """
        before, self._is_deferred = self._is_deferred, False
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
        finally:
            self._is_deferred = before

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self._received_at > SAME_PRESS_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return
        self.received, self._received_at = number, now
        if not self._is_deferred:
            raise Interrupted(number)


def _stays_ignored(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
