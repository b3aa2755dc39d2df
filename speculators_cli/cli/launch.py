"""`--nproc-per-node`: this command on several processes, by torch's elastic launcher."""

import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from speculators_cli.core.errors import SettingsError, SpeculatorsError, StoppedError

REASON_KEYS = {"message", "timestamp"}  # of the file that a launcher gives each rank


def tell_launcher(error: SpeculatorsError) -> None:
    """Write why this rank fails where its launcher looks, torchrun too; it has no other way."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": error.message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps(content), "utf-8")


class RankFailedError(SpeculatorsError):
    """A process of the run failed; it has said why."""


def launch(num_processes: int, arguments: Sequence[str]) -> None:
    """Run a command line in `num_processes` processes, and wait for them.

    Args:
        num_processes: One a rank.
        arguments: Of the command line that asked for them.

    Raises:
        SettingsError: torchrun has started this process as one of several.
        RankFailedError: One of them failed.
        StoppedError: A signal ended them; each has finished its step first.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise SettingsError(
            f"`--nproc-per-node {num_processes}` in a process that torchrun has started",
            hint="Pass the number of processes to torchrun alone",
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # SIGUSR1 asks for a save, so it is passed on; what `nohup` ignores is not.
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append("SIGHUP")
    config = LaunchConfig(
        signals_to_handle=",".join(signals),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "speculators_cli", *_without_launch(arguments))
    except SignalException as stop:
        raise StoppedError(
            f"Stopped {num_processes} processes by signal {stop.sigval:d}",
            signal_number=int(stop.sigval),
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        data = failure.error_file_data
        reason = f": {data['message']}" if data.keys() >= REASON_KEYS else ""
        failed = RankFailedError(
            f"Rank {rank} failed with {how}{reason}", hint="See its message above"
        )
        failed.exit_code = code if code > 0 else 128 - code
        raise failed from None


def _without_launch(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--nproc-per-node"):
            skip = argument == "--nproc-per-node"
            continue
        kept.append(argument)
    return kept
