"""The command table and the one error handler."""

from collections.abc import Sequence
from typing import Annotated

import typer

from speculators_cli import __version__
from speculators_cli.cli.bench import bench
from speculators_cli.cli.build_vocab_map import build_vocab_map
from speculators_cli.cli.convert_v0 import convert_v0
from speculators_cli.cli.demo import demo
from speculators_cli.cli.env import env
from speculators_cli.cli.export import export
from speculators_cli.cli.inspect_data import inspect_data
from speculators_cli.cli.launch import tell_launcher
from speculators_cli.cli.output import Output
from speculators_cli.cli.streams import lasting_streams
from speculators_cli.cli.train import train
from speculators_cli.core.errors import (
    MachineError,
    SpeculatorsError,
    StoppedError,
    unexpected,
)
from speculators_cli.core.signals import Interrupted, StopSignals

app = typer.Typer(
    name="speculators",
    help="Train draft models for speculative decoding",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command(rich_help_panel="Data")(inspect_data)
app.command(rich_help_panel="Data")(convert_v0)
app.command(rich_help_panel="Data")(build_vocab_map)
app.command(rich_help_panel="Draft model")(train)
app.command(rich_help_panel="Draft model")(export)
app.command(rich_help_panel="Try")(demo)
app.command(rich_help_panel="Try")(bench)
app.command(rich_help_panel="Try")(env)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_show_version)
    ] = False,
) -> None:
    """Train draft models for speculative decoding"""  # noqa: D415 - shown as help
    assert not version, "the callback has left"


def run(argv: Sequence[str]) -> int:
    """Run a command line; errors the user can act on become a message and an exit code."""
    # Errors are met before the flags are parsed, too.
    output = Output(is_json="--json" in argv, is_verbose="--verbose" in argv or "-v" in argv)
    with lasting_streams() as streams:
        code = _run(argv, output)
        lost = streams.finish()
        if lost is None or code != 0:
            return code
        error = MachineError(
            f"The result cannot be written to stdout: {lost.strerror}",
            hint="Make room on the disk, or redirect stdout to another one",
        )
        output.error(error)
        # A run keeps its own code: its result is in the save path, too.
        return code if argv[0] == "train" else error.exit_code


def _run(argv: Sequence[str], output: Output) -> int:
    try:
        with StopSignals():
            app(args=list(argv), prog_name="speculators", obj=tuple(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Interrupted as stop:
        number = stop.signal_number
        return _report(StoppedError(f"Stopped by signal {number}", signal_number=number), output)
    except SpeculatorsError as error:
        return _report(error, output)
    except Exception as error:  # noqa: BLE001 - a bug of any kind is reported
        return _report(unexpected(error), output)
    return 0


def _report(error: SpeculatorsError, output: Output) -> int:
    if output.is_verbose:
        output.traceback()
    output.error(error)
    tell_launcher(error)
    return error.exit_code
