"""MetricLogger: a destination of metrics; a failing logger never stops a run."""

from collections.abc import Callable, Mapping
from typing import Protocol

from speculators_cli.core.errors import MachineError


class MetricRecords(Protocol):
    """The record of the run, which also keeps unknown values."""

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics of an optimizer step; `split` is `train` or `val`."""

    def close(self) -> None:
        """Flush and close."""


class MetricLogger(Protocol):
    """One destination of metrics."""

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an optimizer step; `split` is `train` or `val`."""

    def close(self) -> None:
        """Flush and close."""


class SafeLogger:
    """Several loggers as one; those that fail are disabled with a warning.

    Args:
        records: The record of the run, whose failure is an error.
        others: The loggers set by `--logger`, by name.
        warn: Called once for each logger that fails.
    """

    def __init__(
        self, records: MetricRecords, others: dict[str, MetricLogger], warn: Callable[[str], None]
    ) -> None:
        self.records = records
        self.others = others
        self.warn = warn

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics everywhere; unknown values only to the record."""
        self.records.log(step, split, metrics)
        known = {name: value for name, value in metrics.items() if value is not None}
        self._each(lambda logger: logger.log(step, split, known))

    def close(self) -> None:
        """Close all."""
        self.records.close()
        self._each(lambda logger: logger.close())

    def _each(self, action: Callable[[MetricLogger], None]) -> None:
        for name, logger in list(self.others.items()):
            try:
                action(logger)
            except Exception as error:  # noqa: BLE001 - third-party code may raise anything
                del self.others[name]
                self.warn(f"Logger `{name}` failed and is disabled from here on: {error}")


def missing(name: str) -> MachineError:
    """The error for a logger whose package is not installed."""
    return MachineError(
        f"`--logger {name}`: the package `{name}` is not installed",
        hint=f"Install it with `pip install {name}`",
    )
