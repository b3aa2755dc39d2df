"""`--nproc-per-node`: this command on several processes, by torch's elastic launcher."""

import sys
import uuid
from collections.abc import Sequence

from speculators_cli.core.errors import SpeculatorsError, StoppedError


class RankFailedError(SpeculatorsError):
    """A process of the run failed; it has said why."""


def launch(num_processes: int, arguments: Sequence[str]) -> None:
    """Run a command line in `num_processes` processes, and wait for them.

    Args:
        num_processes: One a rank.
        arguments: Of the command line that asked for them.

    Raises:
        RankFailedError: One of them failed.
        StoppedError: A signal ended them; each has finished its step first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
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
        failed = RankFailedError(
            f"Rank {rank} failed with exit code {failure.exitcode}",
            hint="See its message above",
        )
        code = failure.exitcode
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
