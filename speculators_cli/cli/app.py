"""The parser and the one error handler."""

import os
from collections.abc import Container, Sequence
from typing import Annotated

import typer

from speculators_cli import __version__
from speculators_cli.cli.commands import COMMANDS, PROGRAM
from speculators_cli.cli.flags import HELP
from speculators_cli.cli.help import VERSION, show_program_help
from speculators_cli.cli.launch import tell_launcher
from speculators_cli.cli.output import Output
from speculators_cli.cli.streams import lasting_streams
from speculators_cli.cli.usage import explain_usage
from speculators_cli.core.errors import (
    MachineError,
    SettingsError,
    SpeculatorsError,
    StoppedError,
    unexpected,
)
from speculators_cli.core.signals import Interrupted, StopSignals

# What the parser raises; of its kinds, Typer exports this one's child only.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def build_app(words: Container[str]) -> typer.Typer:
    """The parser; it imports the commands that are among the words of the command line."""
    app = typer.Typer(
        name=PROGRAM, add_help_option=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.callback(invoke_without_command=True)(_main)
    for name, command in COMMANDS.items():
        function = command.load() if name in words else _not_among_the_words
        app.command(name, help=command.summary, add_help_option=False)(function)
    return app


def _not_among_the_words() -> None:
    """Stand for a command that only its name is needed of."""


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


def _show_help(context: typer.Context, is_asked: bool) -> None:
    if is_asked and not context.resilient_parsing:
        show_program_help()
        raise typer.Exit


def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option(*VERSION.names, help=VERSION.help, callback=_show_version, is_eager=True)
    ] = False,
    is_help: Annotated[
        bool, typer.Option(*HELP.names, help=HELP.help, callback=_show_help, is_eager=True)
    ] = False,
) -> None:
    assert not version, "the callback has left"
    assert not is_help, "the callback has left"
    if context.invoked_subcommand is None:
        show_program_help(to_stderr=True)
        raise typer.Exit(SettingsError.exit_code)


def _words(argv: Sequence[str]) -> set[str]:
    """The words of the command line, or of the one that a shell wants completed."""
    lines = (os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"))
    return {*argv, *" ".join(lines).split()}


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
            app = build_app(_words(argv))
            code = app(args=list(argv), prog_name=PROGRAM, obj=tuple(argv), standalone_mode=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except USAGE_ERROR as error:
        return _report(explain_usage(argv, str(error)), output)
    except Interrupted as stop:
        number = stop.signal_number
        return _report(StoppedError(f"Stopped by signal {number}", signal_number=number), output)
    except SpeculatorsError as error:
        return _report(error, output)
    except Exception as error:  # noqa: BLE001 - a bug of any kind is reported
        return _report(unexpected(error), output)
    return code if isinstance(code, int) else 0


def _report(error: SpeculatorsError, output: Output) -> int:
    if output.is_verbose:
        output.traceback()
    output.error(error)
    tell_launcher(error)
    return error.exit_code
