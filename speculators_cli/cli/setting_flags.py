"""Settings -> flags: names, help, defaults and choices come from the fields."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from speculators_cli.cli.completion import complete_choice, complete_list
from speculators_cli.cli.flags import CONFIG, HELP, OUTPUT, Flag
from speculators_cli.settings.algorithms import ALGORITHM_SETTINGS
from speculators_cli.settings.base import (
    ListOf,
    OffFlag,
    SettingField,
    Settings,
    choices_of,
    find_mark,
    setting_fields,
)


def flags_of(settings_class: type[Settings], own: tuple[Flag, ...] = ()) -> tuple[Flag, ...]:
    """Every flag of a command, in the order of help.

    Args:
        settings_class: Its fields are sections, the title of each the name of a panel.
        own: Flags of the command that are no settings.
    """
    # A setting that several algorithms have is one flag.
    by_name: dict[str, SettingField] = {}
    for field in setting_fields(settings_class):
        by_name.setdefault(field.name, field)
    fields = list(by_name.values())
    made = [setting_flag(field, settings_class) for field in fields]
    panels = list(dict.fromkeys(flag.panel for flag in (*made, *own)))
    sorted_by_panel = sorted((*made, *own), key=lambda flag: panels.index(flag.panel))
    config = (CONFIG,) if fields else ()
    return (*sorted_by_panel, *config, *OUTPUT, HELP)


def setting_flag(field: SettingField, settings_class: type[Settings]) -> Flag:
    """The flag of a setting."""
    is_switch = field.info.annotation is bool
    off = find_mark(field.info, OffFlag)
    return Flag(
        field.name,
        (field.flag,),
        build_help(field.info, field.name),
        settings_class.model_fields[field.section].title or field.section,
        None if is_switch else field.flag if field.positional else metavar(field.info),
        (off.flag if off else f"--no-{field.flag[2:]}",) if is_switch else (),
        bool if is_switch else list[str] if is_list(field.info) else str,
        complete=_completion(field.info),
        is_positional=field.positional is not None,
    )


def _completion(info: FieldInfo) -> Callable[[str], list[str]] | None:
    choices = choices_of(info)
    if not choices:
        return None  # the shell completes paths
    make = complete_list if _takes_several(info) else complete_choice
    return make(choices)


def is_list(info: FieldInfo) -> bool:
    """Whether a flag may be repeated: settings of several paths."""
    return get_origin(info.annotation) is tuple and get_args(info.annotation)[0] is Path


def build_help(info: FieldInfo, name: str) -> str:
    """Help of a flag: its description and its default, with those of some algorithms."""
    shown = ", ".join(filter(None, (show_default(info), *_own_defaults(info, name))))
    return f"{info.description} ({shown})" if shown else str(info.description)


def _own_defaults(info: FieldInfo, name: str) -> Iterator[str]:
    """The defaults of algorithms that differ from that of the flag."""
    for algorithm, section in ALGORITHM_SETTINGS.items():
        field = section.model_fields.get(name, info)
        default = section.defaults.get(name, field.default)
        if default != info.default:
            yield f"{algorithm}: {'none' if default is None else default}"


def show_default(info: FieldInfo) -> str:
    """The default, as one would type it; empty where the description has it."""
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
    """The kind of value a flag takes, or the values themselves."""
    choices = choices_of(info)
    if choices:
        return f"<{'|'.join(choices)}{',...' if _takes_several(info) else ''}>"
    parts = list(_parts(info.annotation))
    if tuple[int, ...] in parts:
        return "<int,int,...>"
    for kind in (Path, int, float):
        if kind in parts:
            return f"<{kind.__name__.lower()}>"
    return "<str>"


def _takes_several(info: FieldInfo) -> bool:
    return find_mark(info, ListOf) is not None


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
