"""Start the command line: `speculators`, or `python -m speculators_cli` under torchrun."""

import os
import sys

from speculators_cli.cli.app import run


def main() -> None:
    """Run the command named on the command line and exit with its code."""
    code = run(sys.argv[1:])
    if "RANK" in os.environ:
        # gloo's threads outlive the process group. If one wakes while the interpreter shuts down,
        # it aborts the process, and a good run ends with an error. So nothing is shut down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
