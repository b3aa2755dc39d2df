"""Write `docs/reference/`: one page a command, from the flags themselves.

Run `python docs/write_reference.py` after a setting was added or changed; a test compares.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from speculators_cli.cli.app import app
from speculators_cli.settings.base import Settings

REFERENCE_DIR = Path(__file__).parent / "reference"


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of every page."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    classes = {
        info.callback.__name__.replace("_", "-"): getattr(info.callback, "settings_class", None)
        for info in app.registered_commands
        if info.callback is not None
    }
    for name, command in sorted(group.commands.items()):
        assert isinstance(command, TyperCommand)
        yield f"{name}.md", page(name, command, classes[name])


def page(name: str, command: TyperCommand, settings_class: type[Settings] | None) -> str:
    """One command's page."""
    sections = settings_class.model_fields if settings_class is not None else {}
    keys = {info.title: section for section, info in sections.items()}
    panels: dict[str, list[TyperOption]] = defaultdict(list)
    for option in command.params:
        if isinstance(option, TyperOption):
            panels[getattr(option, "rich_help_panel", None) or "Options"].append(option)
    arguments = [a for a in command.params if isinstance(a, TyperArgument)]
    title = " ".join([name, *(str(argument.metavar) for argument in arguments)])
    lines = [f"# `speculators {title}`", "", f"{command.help}.", ""]
    for argument in arguments:
        lines += [f"`{argument.metavar}`: {argument.help}.", ""]
    has_config = any(option.name == "config" for option in command.params)
    if has_config:
        lines += [
            "In a `--config` file a setting stands in its section, under its flag's name with "
            "underscores: `total_seq_len` in `[data]`.",
            "",
        ]
    for panel, options in panels.items():
        section = f" (`[{keys[panel]}]`)" if has_config and panel in keys else ""
        lines += [f"## {panel}{section}", "", "| Flag | Meaning |", "| --- | --- |"]
        lines += [f"| {_flags(option)} | {_meaning(option)} |" for option in options]
        lines.append("")
    return "\n".join(lines)


def _flags(option: TyperOption) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    names = [f"`{flag}{value}`" for flag in option.opts]
    return ", ".join([*names, *(f"`{flag}`" for flag in option.secondary_opts)])


def _meaning(option: TyperOption) -> str:
    return str(option.help).replace("|", "\\|")


def main() -> None:
    """Write all pages."""
    for name, text in pages():
        (REFERENCE_DIR / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
