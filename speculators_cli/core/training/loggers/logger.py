"""MetricLogger: where metrics go; a logger that fails never stops a run."""

from collections.abc import Callable, Mapping
from typing import Protocol

from speculators_cli.core.errors import MachineError


class MetricRecords(Protocol):
    """The run's own record, which has a place for figures that are not known."""

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Keep the metrics of an optimizer step; `split` is `train` or `val`."""

    def close(self) -> None:
        """Write what is still held back."""


class MetricLogger(Protocol):
    """One place that keeps metrics."""

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an optimizer step; `split` is `train` or `val`."""

    def close(self) -> None:
        """Write what is still held back."""


class SafeLogger:
    """Several loggers as one; those that fail are left out with a warning.

    Args:
        records: The run's own record, whose failure is an error.
        others: The loggers the user asked for, by name.
        warn: Told of each logger that fails, once.
    """

    def __init__(
        self, records: MetricRecords, others: dict[str, MetricLogger], warn: Callable[[str], None]
    ) -> None:
        self.records = records
        self.others = others
        self.warn = warn

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Keep the metrics everywhere; those that are not known in the record alone."""
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
            except Exception as error:  # noqa: BLE001 - another project's code, of any error
                del self.others[name]
                self.warn(f"Logger `{name}` failed and is left out from here on: {error}")


def missing(name: str) -> MachineError:
    """The error for a logger whose package is not installed."""
    return MachineError(
        f"`--logger {name}`: the package `{name}` is not installed",
        hint=f"Install it with `pip install {name}`",
    )
