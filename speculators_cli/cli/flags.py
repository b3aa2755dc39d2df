"""What a flag is, and the flags that every command has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators_cli.cli.completion import complete_config_file

GENERAL = "General"


@dataclass(frozen=True)
class Flag:
    """A flag, or a value that stands without one, as help and the parser need it."""

    parameter: str
    names: tuple[str, ...]  # of a positional value: the name of its place
    help: str  # description and default
    panel: str
    metavar: str | None = None  # None: a switch
    off_names: tuple[str, ...] = ()
    kind: Any = str
    minimum: int = 0  # of a number
    complete: Callable[[str], list[str]] | None = None
    is_positional: bool = False


CONFIG = Flag(
    "config",
    ("--config",),
    "Settings file in TOML, YAML or JSON; flags win over it",
    GENERAL,
    "<path>",
    kind=Path,
    complete=complete_config_file,
)
# The same on every command.
OUTPUT = (
    Flag("is_json", ("--json",), "Write the result as JSON", GENERAL, kind=bool),
    Flag("is_quiet", ("--quiet", "-q"), "Print only warnings and errors", GENERAL, kind=bool),
    Flag("is_verbose", ("--verbose", "-v"), "Print full tracebacks", GENERAL, kind=bool),
)
NPROC_PER_NODE = Flag(
    "nproc_per_node",
    ("--nproc-per-node",),
    "Processes to start on this machine, one per GPU",
    "Distributed",
    "<int>",
    kind=int,
    minimum=1,
)
HELP = Flag("help", ("--help", "-h"), "Print this help", GENERAL, kind=bool)
