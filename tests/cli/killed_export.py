"""Exports a checkpoint, and kills this process after one of the stages.

python -m tests.cli.killed_export STAGE CHECKPOINT FOLDER
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from speculators_cli.cli.app import run
from speculators_cli.core import scratch
from speculators_cli.core.export import export
from speculators_cli.core.export.targets import TARGETS

# Functions, by what looks them up.
STAGES: Mapping[str, Any] = {
    "write_weights": export,
    "write_json": export,
    "verify": export,
    "serve_command": TARGETS["vllm"],
    "build_card": export,
    "sync": scratch,
}


def dying(real: Callable[..., object]) -> Callable[..., None]:
    """A function after which the process is killed."""

    def die(*args: Any, **options: Any) -> None:
        real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def main(stage: str, checkpoint: str, folder: str) -> None:
    """Export; does not return."""
    owner = STAGES[stage]
    setattr(owner, stage, dying(getattr(owner, stage)))
    run(["export", checkpoint, "--output-dir", folder])


if __name__ == "__main__":
    main(*sys.argv[1:])
