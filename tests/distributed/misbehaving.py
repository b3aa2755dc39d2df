"""`speculators` in which one rank is killed or hangs before a step: a program for one rank."""

import os
import signal
import sys
import time

from speculators_cli.cli.app import run
from tests.distributed.forked import at_step, send

ACTIONS = {"killed": send(signal.SIGKILL), "asleep": lambda: time.sleep(600)}
LOST_RANK, STEP = 1, 4


def main(action: str, arguments: list[str]) -> None:
    """Run a command line on this rank."""
    if os.environ["RANK"] == str(LOST_RANK):
        at_step(STEP, ACTIONS[action])
    code = run(arguments)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
