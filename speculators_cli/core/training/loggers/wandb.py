"""Weights & Biases, online or (`WANDB_MODE=offline`) on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.errors import MachineError
from speculators_cli.core.training.loggers.logger import missing

PROJECT = "speculators"


class WandbLogger:
    """Logs to the project `speculators`; wandb's variables set account and mode."""

    def __init__(
        self, log_dir: Path, run_name: str, settings: Mapping[str, Any], resumed_step: int | None
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise missing("wandb") from None
        log_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=PROJECT,
                name=run_name,
                dir=str(log_dir),
                config={**settings, "resumed_step": resumed_step},
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise MachineError(
                f"`--logger wandb` cannot start: {error}",
                hint="Run `wandb login`, or set `WANDB_MODE=offline`",
            ) from None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
