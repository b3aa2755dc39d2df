"""Signals that ask a run to finish its step, save and exit."""

import signal
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers the first stop signal while it is open; a second Ctrl-C exits at once."""

    def __init__(self) -> None:
        self.received: int = 0
        self._old: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
