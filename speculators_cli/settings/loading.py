"""load_settings(): flags over a settings file, checked together; every problem is shown at once."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.base import (
    SettingField,
    Settings,
    choices_of,
    join_choices,
    setting_fields,
)
from speculators_cli.settings.config_file import read_config

# What a value must be, by pydantic's name of the error, where its own words are those of Python.
EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "`true` or `false`"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("string_type", "string_unicode"), "text"),
    "path_type": "a path",
}
UNKNOWN = {"extra_forbidden", "invalid_key"}
NOT_A_CHOICE = {"literal_error", "enum", "choice"}
NO_SECTION = {"model_type", "model_attributes_type"}
MAX_SHOWN = 20  # lines of an error
MAX_SHOWN_TEXT = 200  # characters of a value in it
S = TypeVar("S", bound=Settings)


def load_settings(
    settings_class: type[S], flags: Mapping[str, object], config_file: Path | None = None
) -> S:
    """Check flags and settings file together; flags win.

    Args:
        settings_class: Its fields are sections.
        flags: Values by name of the setting, for the flags that were given.
        config_file: TOML, YAML or JSON with sections, or None.

    Raises:
        SettingsError: Names every setting that cannot be used.
    """
    content = read_config(config_file) if config_file is not None else {}
    sections: dict[str, Any] = {name: {} for name in settings_class.model_fields}
    sections |= {name: value if value is not None else {} for name, value in content.items()}
    for field in setting_fields(settings_class):
        if field.name in flags and isinstance(sections[field.section], dict):
            section = sections[field.section] | {field.name: flags[field.name]}
            sections[field.section] = section
    return check_settings(settings_class, sections, config_file)


def check_settings(
    settings_class: type[S], sections: Mapping[str, Any], config_file: Path | None = None
) -> S:
    """Check the values of all sections together.

    Args:
        settings_class: Its fields are sections.
        sections: Values of settings by section.
        config_file: Where they are from, if from a file.

    Raises:
        SettingsError: Names every setting that cannot be used.
    """
    try:
        return settings_class.model_validate(sections)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise _settings_error(settings_class, errors, config_file) from None


def _settings_error(
    settings_class: type[Settings], errors: list[ErrorDetails], config_file: Path | None
) -> SettingsError:
    known = {field.name: field for field in setting_fields(settings_class)}
    # What is not a setting first: values that seem to be missing may stand under another name.
    errors = sorted(errors, key=lambda error: error["type"] not in UNKNOWN | NO_SECTION)
    described = [_describe(error, settings_class, known, config_file) for error in errors]
    lines = list(dict.fromkeys(f"  {line}" for line, _ in described))
    noun = "setting" if len(lines) == 1 else "settings"
    shown = lines[:MAX_SHOWN]
    if len(lines) > MAX_SHOWN:
        shown.append(f"  and {len(lines) - MAX_SHOWN} more")
    # The most telling hint: a name that was meant, or one that a validator gave.
    given = [hint for _, hint in described if hint]
    return SettingsError(
        "\n".join([f"{len(lines)} {noun} cannot be used", *shown]),
        hint=given[0] if given else _see_help(settings_class),
    )


def _describe(
    error: ErrorDetails,
    settings_class: type[Settings],
    known: Mapping[str, SettingField],
    config_file: Path | None,
) -> tuple[str, str | None]:
    """One line on what is wrong with which setting, and a hint."""
    path = [str(part) for part in error["loc"]]
    kind = error["type"]
    if kind in UNKNOWN:
        return _describe_unknown(path, settings_class, known, config_file)
    if kind in NO_SECTION:
        return _describe_section(path[0], error["input"], settings_class, config_file)
    # A check of all settings together has no path.
    name = next(iter(path[1:2] or path), "")
    shown = known[name].flag if name in known else name or str(config_file)
    if kind == "missing":
        return f"`{shown}` is required", None
    return _describe_value(shown, error, known.get(name))


def _describe_value(
    shown: str, error: ErrorDetails, field: SettingField | None
) -> tuple[str, str | None]:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "path":
        return f"`{context.get('flag') or shown}`: {error['msg']}", context.get("hint")
    if kind in NOT_A_CHOICE and field is not None:
        value = str(context.get("given", error["input"]))
        return _describe_choice(shown, value, choices_of(field.info))
    if kind == "value_error":
        reason = error["msg"].removeprefix("Value error, ")
        return (f"`{shown}` {reason}" if field is not None else reason), None
    if kind == "string_too_short" and error["input"] == "":
        return f"`{shown}` must not be empty", None
    reason = error["msg"].replace("Input should be", "must be")
    if kind in EXPECTED:
        reason = f"must be {EXPECTED[kind]}"
    return f"`{shown}` {reason}, got `{_shorten(error['input'])}`", None


def _see_help(settings_class: type[Settings]) -> str:
    return f"Run `speculators {settings_class.command} --help` for every setting"


def _describe_choice(shown: str, value: str, choices: Sequence[str]) -> tuple[str, str | None]:
    close = difflib.get_close_matches(value, choices, n=1)
    line = f"`{shown}` must be {join_choices(choices)}, got `{_shorten(value)}`"
    return line, f"Did you mean `{shown} {close[0]}`?" if close else None


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_TEXT else f"{text[:MAX_SHOWN_TEXT]}..."


def _describe_section(
    name: str, value: object, settings_class: type[Settings], config_file: Path | None
) -> tuple[str, str | None]:
    example = next(field.name for field in setting_fields(settings_class) if field.section == name)
    return (
        f"`{name}` in `{config_file}` must be a section of settings, got `{_shorten(value)}`",
        f"Write the settings below it, such as `{name}.{example}`",
    )


def _describe_unknown(
    path: list[str],
    settings_class: type[Settings],
    known: Mapping[str, SettingField],
    config_file: Path | None,
) -> tuple[str, str | None]:
    name = ".".join(path)
    full_names = [f"{field.section}.{field.name}" for field in known.values()]
    if len(path) == 1:
        full_names += settings_class.model_fields
    close = difflib.get_close_matches(name, full_names, n=1)
    if path[-1] in known:
        close = [f"{known[path[-1]].section}.{path[-1]}"]
    line = f"`{_shorten(name)}` in `{config_file}` is not a setting"
    if close:
        return line, f"Did you mean `{close[0]}`? {_see_help(settings_class)}"
    if len(path) == 1:
        sections = ", ".join(f"`{section}`" for section in settings_class.model_fields)
        return line, f"Use the sections {sections}"
    return line, None
