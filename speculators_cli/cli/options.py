"""Settings class -> command: its flags, its help, its settings file."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from speculators_cli.cli.commands import COMMANDS, PROGRAM
from speculators_cli.cli.flags import HELP, OUTPUT, Flag
from speculators_cli.cli.help import show_command_help
from speculators_cli.cli.output import Output
from speculators_cli.cli.setting_flags import flags_of
from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.base import Settings, setting_fields
from speculators_cli.settings.config_file import read_config
from speculators_cli.settings.loading import load_settings


def with_settings(
    settings_class: type[Settings], *own: Flag, examples: tuple[str, ...]
) -> Callable[[Callable[..., Any]], Any]:
    """Give a command one flag for each setting, `--config`, and those that choose how it speaks.

    It receives its checked `settings`, an `Output` as `output`, and the values of its own flags.

    Args:
        settings_class: Its fields are sections.
        own: Flags that are no settings.
        examples: Command lines that its help ends with.
    """
    flags = flags_of(settings_class, own)

    def decorate(command: Callable[..., Any]) -> Any:
        name = command.__name__.replace("_", "-")
        names = list(dict.fromkeys(field.name for field in setting_fields(settings_class)))

        def run(**values: Any) -> Any:
            values.pop(HELP.parameter)
            given = {key: values.pop(key) for key in names}
            given = {key: value for key, value in given.items() if value not in (None, [])}
            output = Output(**{flag.parameter: values.pop(flag.parameter) for flag in OUTPUT})
            numbers = [flag for flag in own if flag.kind is int]
            values |= {flag.parameter: _number(flag, values[flag.parameter]) for flag in numbers}
            settings = load(name, settings_class, given, values.pop("config", None))
            return command(settings=settings, output=output, **values)

        def show_help(context: typer.Context, is_asked: bool) -> None:
            if is_asked and not context.resilient_parsing:
                show_command_help(COMMANDS[name], flags, examples)
                raise typer.Exit

        signature = inspect.signature(command)
        contexts = [p for p in signature.parameters.values() if p.annotation is typer.Context]
        parameters = [*contexts, *(_parameter(flag, show_help) for flag in flags)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__ = command.__name__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.settings_class = settings_class  # type: ignore[attr-defined]
        run.flags = flags  # type: ignore[attr-defined]
        run.examples = examples  # type: ignore[attr-defined]
        return run

    return decorate


def load(
    name: str, settings_class: type[Settings], given: dict[str, Any], config: Path | None
) -> Settings:
    """The settings of a command; those of another command's file are refused by its name.

    Raises:
        SettingsError: They cannot be used.
    """
    try:
        return load_settings(settings_class, given, config)
    except SettingsError:
        owner = None if config is None else _owner(read_config(config), settings_class)
        if owner is None:
            raise
    sections = ", ".join(f"`{section}`" for section in settings_class.model_fields)
    raise SettingsError(
        f"`{config}` holds settings of `{PROGRAM} {owner}`, not of `{PROGRAM} {name}`",
        hint=f"Run `{PROGRAM} {owner} --config {config}`, or pass a file with the sections "
        f"{sections}",
    )


def _owner(content: dict[str, Any], settings_class: type[Settings]) -> str | None:
    """The command that takes all settings of a file, where this one does not."""
    if not content or _takes(settings_class, content):
        return None
    return next(
        (name for name, it in COMMANDS.items() if _takes(it.load().settings_class, content)),
        None,
    )


def _takes(settings_class: type[Settings], content: dict[str, Any]) -> bool:
    known = {(field.section, field.name) for field in setting_fields(settings_class)}
    return all(
        isinstance(values, dict) and {(section, name) for name in values} <= known
        for section, values in content.items()
    )


def _number(flag: Flag, text: str | None) -> int | None:
    if text is None:
        return None
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if number < flag.minimum:
        raise SettingsError(
            f"`{flag.names[0]}` must be a whole number of at least {flag.minimum}, got `{text}`",
            hint=f"Pass `{flag.names[0]} {flag.minimum}` or more",
        )
    return number


def _parameter(flag: Flag, show_help: Callable[..., None]) -> inspect.Parameter:
    kind: Any = str if flag.kind is int else flag.kind
    is_switch = flag.kind is bool and not flag.off_names
    annotation = kind if is_switch else kind | None
    default = False if is_switch else None
    if flag.is_positional:
        info: Any = typer.Argument(metavar=flag.metavar, show_default=False)
    else:
        info = typer.Option(
            *_declarations(flag),
            help=re.split(r"[;:(]", flag.help)[0].strip(),  # beside what a shell completes
            metavar=flag.metavar,
            autocompletion=flag.complete,
            is_eager=flag is HELP,
            callback=show_help if flag is HELP else None,
        )
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, info],
    )


def _declarations(flag: Flag) -> tuple[str, ...]:
    return (f"{flag.names[0]}/{flag.off_names[0]}",) if flag.off_names else flag.names
