"""Write `docs/reference/`: one page per command, from its flags.

Run `python docs/write_reference.py` after a setting was added or changed; a test compares.
"""

from collections.abc import Iterator
from pathlib import Path

from speculators_cli.cli.commands import COMMANDS, PROGRAM, SUMMARY, Command
from speculators_cli.cli.flags import CONFIG, Flag
from speculators_cli.cli.help import PROGRAM_FLAGS
from speculators_cli.settings.base import setting_fields

REFERENCE_DIR = Path(__file__).parent / "reference"
PROGRAM_TEXT = """\
## Settings files

Every command with settings takes `--config FILE`: `.toml`, `.yaml`, `.yml` or `.json`, with the
sections that its page lists. Flags win over the file, the file wins over defaults, and all problems
are reported at once. Arguments may be in the file too: `v0_path` in `[files]` for `convert-v0`.
Relative paths start at the current folder. A run writes its `settings.json` to the save path;
`speculators train --config checkpoints/settings.json` repeats it.

## Shell completion

`speculators --install-completion` installs completion for the shell it is run in (bash, zsh, fish
or PowerShell); it takes effect in a new terminal. It completes commands, flags, choices and paths,
and settings files after `--config`.

## Exit codes

| Code | Meaning |
| --- | --- |
| 0 | done, no problem found |
| 1 | done, but problems were found, or an unexpected error |
| 2 | flags, settings or the paths in them cannot be used; nothing was written |
| 3 | data cannot be used |
| 4 | a checkpoint or export cannot be used or written |
| 5 | the environment: disk, memory, device, hub, a missing package |
| 6 | training diverged |
| 128 + N | stopped by signal N; `train` first saves a checkpoint |

From Python: [the library](library.md).
"""


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of every page."""
    yield f"{PROGRAM}.md", program_page()
    for command in COMMANDS.values():
        yield f"{command.name}.md", page(command)


def program_page() -> str:
    """The page of all commands."""
    lines = [f"# `{PROGRAM}`", "", f"{SUMMARY}. `{PROGRAM} COMMAND --help` ends with examples.", ""]
    for panel in dict.fromkeys(command.panel for command in COMMANDS.values()):
        lines += [f"## {panel}", "", "| Command | Purpose |", "| --- | --- |"]
        for command in COMMANDS.values():
            if command.panel == panel:
                lines.append(f"| [`{command.name}`]({command.name}.md) | {command.summary} |")
        lines.append("")
    lines += ["## General", "", "| Flag | Meaning |", "| --- | --- |"]
    lines += [f"| {_names(flag)} | {flag.help} |" for flag in PROGRAM_FLAGS]
    return "\n".join([*lines, "", PROGRAM_TEXT])


def page(command: Command) -> str:
    """One command's page."""
    function = command.load()
    flags: tuple[Flag, ...] = function.flags
    keys = {info.title: name for name, info in function.settings_class.model_fields.items()}
    arguments = [flag for flag in flags if flag.is_positional]
    title = " ".join([PROGRAM, command.name, *(str(argument.metavar) for argument in arguments)])
    lines = [f"# `{title}`", "", f"{command.summary}.", ""]
    for argument in arguments:
        lines += [f"`{argument.metavar}`: {argument.help}.", ""]
    lines += ["```bash", *function.examples, "```", ""]
    if CONFIG in flags:
        field = next(iter(setting_fields(function.settings_class)))
        lines += [
            "In a `--config` file, settings are grouped in sections and named as their flags, with "
            f"underscores: `{field.name}` in `[{field.section}]`.",
            "",
        ]
    options = [flag for flag in flags if not flag.is_positional]
    for panel in dict.fromkeys(flag.panel for flag in options):
        section = f" (`[{keys[panel]}]`)" if panel in keys else ""
        lines += [f"## {panel}{section}", "", "| Flag | Meaning |", "| --- | --- |"]
        lines += [
            f"| {_names(flag)} | {_escape(flag.help)} |" for flag in options if flag.panel == panel
        ]
        lines.append("")
    return "\n".join(lines)


def _names(flag: Flag) -> str:
    value = f" {_escape(flag.metavar)}" if flag.metavar else ""
    names = [f"`{name}{value}`" for name in flag.names]
    return ", ".join([*names, *(f"`{name}`" for name in flag.off_names)])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write all pages."""
    for name, text in pages():
        (REFERENCE_DIR / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
