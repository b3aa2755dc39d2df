"""Signals that ask a run to finish its step, save and exit."""

import os
import signal
import time
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A launcher passes a Ctrl-C on to processes that the terminal has sent it to already.
SAME_PRESS_SECONDS = 0.5


class StopSignals:
    """Remembers the first stop signal while it is open; a second Ctrl-C exits at once."""

    def __init__(self) -> None:
        self.received: int = 0
        self._received_at = 0.0
        self._old: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif number == signal.SIGINT and now - self._received_at > SAME_PRESS_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
