"""TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.training.loggers.logger import missing


class TensorboardLogger:
    """Writes event files into the log folder; tags are `train/loss`, `val/loss` and so on."""

    def __init__(
        self, log_dir: Path, run_name: str, settings: Mapping[str, Any], resumed_step: int | None
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing("tensorboard") from None
        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)
        lines = [f"    {section}: {values}" for section, values in settings.items()]
        self._writer.add_text("settings", "\n".join([run_name, "", *lines]))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
