"""Settings class -> flags: names, help and defaults come from the fields."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from speculators_cli.cli.output import Output
from speculators_cli.settings.base import OffFlag, SettingField, Settings, setting_fields

# The same on every command: parameter -> flags and help.
OUTPUT_FLAGS = {
    "is_json": (("--json",), "Write the result as JSON"),
    "is_quiet": (("--quiet", "-q"), "Warnings and errors only"),
    "is_verbose": (("--verbose", "-v"), "Full tracebacks"),
}


def with_settings(settings_class: type[Settings]) -> Callable[[Callable[..., Any]], Any]:
    """Give a command one flag for each setting, and those that choose how it speaks.

    It receives the settings given as `flags`, and an `Output` as `output`. Its other parameters
    stay options of their own.
    """

    def decorate(command: Callable[..., Any]) -> Any:
        fields = list(setting_fields(settings_class))

        def run(**values: Any) -> Any:
            flags = {field.name: values.pop(field.name) for field in fields}
            given = {name: value for name, value in flags.items() if value not in (None, [])}
            output = Output(**{name: values.pop(name) for name in OUTPUT_FLAGS})
            return command(flags=given, output=output, **values)

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name not in ("flags", "output")]
        made = [_parameter(settings_class, field) for field in fields]
        spoken = [_output_parameter(name) for name in OUTPUT_FLAGS]
        parameters = sorted(
            [*made, *own, *spoken], key=lambda p: p.default is not inspect.Parameter.empty
        )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.settings_class = settings_class  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(settings_class: type[Settings], field: SettingField) -> inspect.Parameter:
    panel = settings_class.model_fields[field.section].title
    if field.positional is not None:
        argument = typer.Argument(
            help=str(field.info.description), metavar=field.flag, show_default=False
        )
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, argument]
        )
    is_switch = field.info.annotation is bool
    option = typer.Option(
        *_declarations(field),
        help=describe(field.info),
        rich_help_panel=panel,
        show_default=False,
        metavar=None if is_switch else metavar(field.info),
    )
    kind: Any = bool | None if is_switch else str | None
    if is_list(field.info):
        kind = list[str] | None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option],
    )


def _output_parameter(name: str) -> inspect.Parameter:
    flags, text = OUTPUT_FLAGS[name]
    option = typer.Option(*flags, help=text, rich_help_panel="Output")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def _declarations(field: SettingField) -> tuple[str, ...]:
    if field.info.annotation is not bool:
        return (field.flag,)
    off = next((m.flag for m in field.info.metadata if isinstance(m, OffFlag)), None)
    return (f"{field.flag}/{off or '--no-' + field.flag[2:]}",)


def is_list(info: FieldInfo) -> bool:
    """Whether a flag may be repeated: settings of several paths."""
    return get_origin(info.annotation) is tuple and get_args(info.annotation)[0] is Path


def describe(info: FieldInfo) -> str:
    """Help of a flag: its description and its default."""
    default = show_default(info)
    return f"{info.description} ({default})" if default else str(info.description)


def show_default(info: FieldInfo) -> str:
    """The default, as one would type it; empty where the description says it."""
    if info.is_required():
        return "required"
    default = info.default
    assert default is not PydanticUndefined, "settings have plain defaults"
    if default in (None, ()):
        return ""
    if default == "":
        return "default: none"
    if isinstance(default, bool):
        return f"default: {'on' if default else 'off'}"
    if isinstance(default, tuple):
        return f"default: {', '.join(map(str, default))}"
    return f"default: {default}"


def metavar(info: FieldInfo) -> str:
    """The kind of value a flag takes."""
    kinds = set(_plain_types(info.annotation))
    for kind in (Path, int, float):
        if kind in kinds:
            return f"<{kind.__name__.lower()}>"
    return "<str>"


def _plain_types(annotation: Any) -> Iterator[type]:
    """The types of the values that an annotation allows."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from _plain_types(part)
    else:
        yield annotation
