"""Start the command line: `speculators`, or `python -m speculators_cli` under torchrun."""

import sys

from speculators_cli.cli.app import run


def main() -> None:
    """Run the command named on the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
