"""The metric loggers, by name; metrics.jsonl is always written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speculators_cli.core.errors import MachineError, SpeculatorsError
from speculators_cli.core.training.loggers.jsonl import JsonlLogger
from speculators_cli.core.training.loggers.logger import MetricLogger, SafeLogger
from speculators_cli.core.training.loggers.tensorboard import TensorboardLogger
from speculators_cli.core.training.loggers.trackio import TrackioLogger
from speculators_cli.core.training.loggers.wandb import WandbLogger

__all__ = ["LOGGERS", "MetricLogger", "SafeLogger", "build_loggers"]

OpenLogger = Callable[[Path, str, Mapping[str, Any], int | None], MetricLogger]
LOGGERS: dict[str, OpenLogger] = {
    "tensorboard": TensorboardLogger,
    "trackio": TrackioLogger,
    "wandb": WandbLogger,
}


def build_loggers(
    names: Sequence[str],
    *,
    metrics_file: Path,
    log_dir: Path,
    run_name: str | None,
    settings: Mapping[str, Any],
    resumed_step: int | None,
    warn: Callable[[str], None],
) -> SafeLogger:
    """Open metrics.jsonl and the named loggers.

    Args:
        names: Keys of `LOGGERS`; without any, the log folder is not created.
        metrics_file: Truncated to `resumed_step`, or created anew.
        log_dir: Loggers write into a subfolder with the name of the run.
        run_name: None: the name of the save path.
        settings: Logged with the metrics.
        resumed_step: The step that the run is resumed from.
        warn: Called once for each logger that fails later.

    Raises:
        MachineError: A logger's package is missing, or it cannot start.
    """
    run_name = run_name or metrics_file.parent.resolve().name or "run"
    opened: dict[str, MetricLogger] = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name](log_dir / run_name, run_name, settings, resumed_step)
        except SpeculatorsError:
            raise
        except Exception as error:  # noqa: BLE001 - third-party code may raise anything
            raise MachineError(
                f"`--logger {name}` cannot start: {error}",
                hint=f"Check `--log-dir {log_dir}`, or remove the logger",
            ) from None
    return SafeLogger(JsonlLogger(metrics_file, resumed_step), opened, warn)
