"""Settings: frozen, checked once, read from a file under the flags."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import replacing, write_json


@dataclass(frozen=True)
class OnResume:
    """What happens when a resumed run is given another value than it began with."""

    change: Literal["warned", "refused"]


REFUSED_ON_RESUME = OnResume("refused")
WARNED_ON_RESUME = OnResume("warned")


@dataclass(frozen=True)
class OffFlag:
    """The flag that turns a switch off, where `--no-...` would not read well."""

    flag: str


@dataclass(frozen=True)
class Positional:
    """The value stands in the command line without a flag, under this name."""

    name: str


class Settings(BaseModel):
    """Base of all settings classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _take_any_file_name(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        """Let text name files whose names are not UTF-8, which pydantic does not take as text."""
        try:
            return handler(value)
        except ValidationError as error:
            if not isinstance(value, str) or error.errors()[0]["type"] != "string_unicode":
                raise
        handler(_printable(value))
        return value


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class SettingField:
    """One setting in its section."""

    section: str
    name: str
    info: FieldInfo

    @property
    def positional(self) -> Positional | None:
        """How it is named, if it is set without a flag."""
        return next((m for m in self.info.metadata if isinstance(m, Positional)), None)

    @property
    def flag(self) -> str:
        """The flag that sets it, or the name of its place."""
        if self.positional is not None:
            return self.positional.name
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Change:
    """A setting whose value is not the one a run began with."""

    name: str  # its flag
    old: object
    new: object
    kind: Literal["warned", "refused"]


def setting_fields(settings_class: type[Settings]) -> Iterator[SettingField]:
    """Every setting of a class of sections, in order."""
    for section, section_info in settings_class.model_fields.items():
        section_class = section_info.annotation
        assert isinstance(section_class, type), "a section is a settings class"
        assert issubclass(section_class, Settings), "a section is a settings class"
        for name, info in section_class.model_fields.items():
            yield SettingField(section, name, info)


def _printable(text: str) -> str:
    """The text, its bytes that are not UTF-8 escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def path_error(path: Path, problem: str, *, hint: str | None = None) -> PydanticCustomError:
    """A path that cannot be used, to raise in a validator; `hint` reaches the user."""
    return PydanticCustomError(
        "path",
        "`{path}` {problem}",
        {"path": _printable(str(path)), "problem": problem, "hint": hint},
    )


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise path_error(folder, "is not a folder" if folder.exists() else "does not exist")
    return folder


def _check_folders(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(map(_check_folder, folders))


def _read_number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _check_layer_ids(ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if ids is not None and (
        any(low >= high for low, high in pairwise(ids)) or min(ids, default=-1) < 0
    ):
        given = ",".join(map(str, ids))
        raise ValueError(f"must be strictly ascending and not negative, got `{given}`")
    return ids


# A folder that must exist, folders, a data format and its version, layer ids: as a flag gives them.
Folder = Annotated[Path, AfterValidator(_check_folder)]
Folders = Annotated[tuple[Path, ...], AfterValidator(_check_folders)]
DataFormat = Annotated[
    Literal["auto", "pt", "speculators", "specforge"],
    Field(
        description="Whose format the samples are in: pt, speculators, specforge, or auto: by what "
        "the folder holds"
    ),
]
FormatVersion = Annotated[
    Literal[0, 1],
    BeforeValidator(_read_number),
    Field(description="Format of `.pt` samples: 0 or 1"),
]
TrustRemoteCode = Annotated[
    bool, Field(description="Run the Python code that comes with the verifier")
]
LayerIdsSetting = Annotated[
    tuple[int, ...] | None, BeforeValidator(_split), AfterValidator(_check_layer_ids)
]


def load_settings(
    settings_class: type[S], flags: Mapping[str, object], config_file: Path | None
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
    try:
        return settings_class.model_validate(sections)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise _settings_error(settings_class, errors, config_file) from None


def read_config(file: Path) -> dict[str, Any]:
    """Read a settings file; CRLF and a byte order mark are accepted.

    Raises:
        SettingsError: It cannot be read or parsed.
    """
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".toml":
            content = tomllib.loads(text)
        elif file.suffix in {".yaml", ".yml"}:
            content = yaml.safe_load(text)
        elif file.suffix == ".json":
            content = json.loads(text)
        else:
            raise ValueError("its name must end in `.toml`, `.yaml`, `.yml` or `.json`")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(
            f"`--config`: `{file}` cannot be read: {reason}", hint="Name a settings file"
        ) from None
    if not isinstance(content, dict):
        raise SettingsError(f"`--config`: `{file}` holds no sections", hint="Name a settings file")
    return content


def write_settings(settings: Settings, file: Path) -> None:
    """Write all settings, defaults included, so that `--config` accepts them back."""
    with replacing(file) as temporary:
        write_json(settings.model_dump(mode="json"), temporary)


def changes_on_resume(old: Mapping[str, Any], new: Settings) -> list[Change]:
    """Settings that matter to a resumed run and differ from those it began with."""
    current = new.model_dump(mode="json")
    changes = []
    for field in setting_fields(type(new)):
        kind = next((m.change for m in field.info.metadata if isinstance(m, OnResume)), None)
        before = old.get(field.section, {}).get(field.name)
        now = current[field.section][field.name]
        if kind is not None and before != now:
            changes.append(Change(field.flag, before, now, kind))
    return changes


def _settings_error(
    settings_class: type[Settings], errors: list[ErrorDetails], config_file: Path | None
) -> SettingsError:
    known = {field.name: field for field in setting_fields(settings_class)}
    lines, hints = [], []
    for error in errors:
        line, hint = _describe(error, settings_class, known, config_file)
        lines.append(f"  {line}")
        hints.append(hint)
    noun = "setting" if len(lines) == 1 else "settings"
    # The most telling hint: one that a validator gave, or a name that was meant.
    given = [hint for hint in hints if hint]
    return SettingsError(
        "\n".join([f"{len(lines)} {noun} cannot be used", *dict.fromkeys(lines)]),
        hint=given[0] if given else "See `--help` of the command for every setting",
    )


def _describe(
    error: ErrorDetails,
    settings_class: type[Settings],
    known: Mapping[str, SettingField],
    config_file: Path | None,
) -> tuple[str, str | None]:
    """One line on what is wrong with which setting, and a hint."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return _describe_unknown(path, settings_class, known, config_file)
    # A check of all settings together has no path.
    name = next(iter(path[1:2] or path), "")
    shown = known[name].flag if name in known else f"`{name}`"
    if error["type"] == "missing":
        return f"`{shown}` is required", None
    if error["type"] == "path":
        context = error.get("ctx", {})
        return f"`{shown}`: {error['msg']}", context.get("hint")
    if error["type"] == "value_error":
        reason = error["msg"].removeprefix("Value error, ")
        return (f"`{shown}` {reason}" if name in known else reason), None
    reason = error["msg"].replace("Input should be", "must be")
    return f"`{shown}` {reason}, got `{error['input']}`", None


def _describe_unknown(
    path: list[str],
    settings_class: type[Settings],
    known: Mapping[str, SettingField],
    config_file: Path | None,
) -> tuple[str, str | None]:
    name = ".".join(path)
    full_names = [f"{field.section}.{field.name}" for field in known.values()]
    full_names += settings_class.model_fields
    close = difflib.get_close_matches(name, full_names, n=1)
    if not close and path[-1] in known:
        close = [f"{known[path[-1]].section}.{path[-1]}"]
    hint = f"Did you mean `{close[0]}`? See `--help` of the command for every setting"
    return f"`{name}` in `{config_file}` is not a setting", hint if close else None
