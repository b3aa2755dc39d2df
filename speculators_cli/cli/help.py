"""Help of the program and of each command."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from speculators_cli.cli.commands import COMMANDS, PROGRAM, SUMMARY, Command
from speculators_cli.cli.flags import GENERAL, HELP, Flag

VERSION = Flag("version", ("--version",), "Print the version", GENERAL, kind=bool)
COMPLETION = (
    Flag("", ("--install-completion",), "Install completion for this shell", GENERAL, kind=bool),
    Flag("", ("--show-completion",), "Print the completion script", GENERAL, kind=bool),
)
PROGRAM_FLAGS = (VERSION, *COMPLETION, HELP)
EXAMPLES = (
    "speculators demo",
    "speculators train --help",
    "speculators inspect-data data",
)
LEFT_WIDTH = 34  # of the names of flags, where there is room for it
GAP = 2
MIN_TEXT_WIDTH = 18


def show_program_help(*, to_stderr: bool = False) -> None:
    """Write what `speculators --help` shows."""
    console = Console(stderr=to_stderr, highlight=False, markup=False)
    _head(console, f"{PROGRAM} [OPTIONS] COMMAND [ARGS]...", SUMMARY)
    for panel in dict.fromkeys(command.panel for command in COMMANDS.values()):
        commands = [command for command in COMMANDS.values() if command.panel == panel]
        left = max(map(len, COMMANDS))
        rows = [([Text(command.name, "cyan")], command.summary) for command in commands]
        _panel(console, panel, rows, left)
    _flag_panel(console, GENERAL, PROGRAM_FLAGS)
    _examples(console, EXAMPLES)


def show_command_help(command: Command, flags: Sequence[Flag], examples: Sequence[str]) -> None:
    """Write what `--help` of a command shows."""
    console = Console(highlight=False, markup=False)
    arguments = [flag for flag in flags if flag.is_positional]
    usage = " ".join([PROGRAM, command.name, "[OPTIONS]", *(str(a.metavar) for a in arguments)])
    _head(console, usage, command.summary)
    if arguments:
        rows = [([Text(str(flag.metavar), "cyan")], flag.help) for flag in arguments]
        _panel(console, "Arguments", rows, max(len(str(flag.metavar)) for flag in arguments))
    options = [flag for flag in flags if not flag.is_positional]
    for panel in dict.fromkeys(flag.panel for flag in options):
        _flag_panel(console, panel, [flag for flag in options if flag.panel == panel])
    _examples(console, examples)


def _head(console: Console, usage: str, summary: str) -> None:
    console.print(Text.assemble(" ", ("Usage:", "yellow"), f" {usage}"))
    console.print()
    console.print(Text(f" {summary}"))
    console.print()


def _flag_panel(console: Console, title: str, flags: Iterable[Flag]) -> None:
    rows = [(_names(flag), flag.help) for flag in flags]
    # On a narrow terminal the text keeps two thirds of the window.
    _panel(console, title, rows, min(LEFT_WIDTH, console.width // 2 - GAP))


def _names(flag: Flag) -> list[Text]:
    """The names of a flag, one line for on and one for off."""
    on = Text(", ".join(flag.names), "cyan")
    if flag.metavar:
        on.append(f" {flag.metavar}", "yellow")
    return [on, *(Text(name, "cyan") for name in flag.off_names)]


def _panel(
    console: Console, title: str, rows: Sequence[tuple[list[Text], str]], left_width: int
) -> None:
    """Draw names and what they mean; names that are too long stand above their text."""
    room = console.width - 4 - left_width - GAP
    if room < MIN_TEXT_WIDTH:
        left_width, room = 0, max(console.width - 4 - GAP, 1)
    lines: list[Text] = []
    for names, meaning in rows:
        texts = textwrap.wrap(meaning, room, break_on_hyphens=False)
        if any(name.cell_len > left_width for name in names):
            lines += names
            names = []
        for name, text in zip_longest(names, texts):
            start = name if name is not None else Text()
            padding = " " * (left_width + GAP - start.cell_len)
            lines.append(Text.assemble(start, padding, text or ""))
    body = Text("\n").join(lines)
    console.print(Panel(body, title=Text(title), title_align="left", border_style="dim"))


def _examples(console: Console, examples: Sequence[str]) -> None:
    console.print(Text(" Examples", "yellow"))
    for example in examples:
        # Not wrapped, so that it can be copied.
        console.print(Text(f"   {example}"), soft_wrap=True)
    console.print()
