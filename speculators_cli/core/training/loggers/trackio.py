"""Trackio, stored on this machine."""

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.training.loggers.logger import missing

PROJECT = "speculators"


class TrackioLogger:
    """Logs to the project `speculators` in the log folder, unless `TRACKIO_DIR` is set."""

    def __init__(
        self, log_dir: Path, run_name: str, settings: Mapping[str, Any], resumed_step: int | None
    ) -> None:
        # Read when trackio is imported.
        os.environ.setdefault("TRACKIO_DIR", str(log_dir.absolute()))
        try:
            import trackio
        except ImportError:
            raise missing("trackio") from None
        self._finish: Callable[[], None] = trackio.finish
        # It prints to stdout, which is reserved for the result.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=run_name,
                config={**settings, "resumed_step": resumed_step},
                resume="never" if resumed_step is None else "allow",
                embed=False,
            )

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Wait until everything is on disk."""
        with contextlib.redirect_stdout(io.StringIO()):
            # Not `finish` of the run: trackio would then finish it again at exit, with a message.
            self._finish()
