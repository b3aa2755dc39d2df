"""Start the command line: `speculators`, or `python -m speculators_cli` under torchrun."""

import atexit
import os
import sys
from contextlib import suppress

from speculators_cli.cli.app import run
from speculators_cli.cli.streams import open_missing_descriptors

# How idle OpenMP threads wait: variables of the standard, of GCC's and of LLVM's runtime.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPIN_COUNT = 1000  # GCC's own where there are more threads than cores; else it spins 300,000 times


def main() -> None:
    """Run the command named on the command line and exit with its code."""
    open_missing_descriptors()
    limit_spinning()
    codes: list[int] = []
    # The first of those that the command and its libraries register, so it is called last.
    atexit.register(_leave, codes)
    codes.append(run(sys.argv[1:]))
    if "RANK" in os.environ:
        # gloo's threads outlive the process group. If one wakes while the interpreter shuts down,
        # it aborts the process, and a good run ends with an error. So nothing is shut down.
        _leave(codes)
    sys.exit(codes[0])


def limit_spinning() -> None:
    """Let idle OpenMP threads spin briefly, then sleep, unless the environment sets how they wait.

    Call before torch is imported. On a core that another process shares, threads that spin wait
    for one that is not scheduled: small models become ten times slower, not two. Threads that
    sleep at once take longer to wake up than the work of a small model takes.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _leave(codes: list[int]) -> None:
    """End the process with the command's code, if it came to one.

    Nothing is taken apart: with torch and transformers in it, the interpreter needs a second for
    that, about as long as they took to import.
    """
    if codes:
        for stream in (sys.stdout, sys.stderr):
            # A closed one is None, and who reads a pipe may have left.
            with suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    main()
