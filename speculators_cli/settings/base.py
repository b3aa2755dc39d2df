"""Settings: frozen and checked once; the kinds of values they have."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

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
from pydantic_core import PydanticCustomError

from speculators_cli.core.files import find_existing, replacing, write_json

LARGEST = 2**63 - 1  # whole number of a setting
CONVERSATION_SUFFIXES = (".jsonl", ".json", ".parquet")
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class OnResume:
    """What happens when a resumed run is given another value than it began with."""

    change: Literal["warned", "refused"]


REFUSED_ON_RESUME = OnResume("refused")
WARNED_ON_RESUME = OnResume("warned")


def _absolute(name: str | None) -> str | None:
    # What is stored with a run or a draft is found from any folder.
    return os.path.abspath(name) if name and os.path.isdir(name) else name  # noqa: PTH100, PTH112


# A folder or a hub id: a folder's path is made absolute, and so never taken for a hub id later.
MODEL_NAME = AfterValidator(_absolute)


@dataclass(frozen=True)
class OffFlag:
    """The flag that turns a switch off, where `--no-...` would not read well."""

    flag: str


@dataclass(frozen=True)
class ListOf:
    """The text is a list with commas between its values, each one of these."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class KeyOf:
    """The text is a key of a table, which may grow."""

    table: Mapping[str, object]

    def check(self, value: str) -> str:
        """The value, if the table has it."""
        if value not in self.table:
            raise not_a_choice(value, tuple(self.table))
        return value


@dataclass(frozen=True)
class Positional:
    """The value stands in the command line without a flag, under this name."""

    name: str


class Settings(BaseModel):
    """Base of all settings classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    command: ClassVar[str] = ""  # that has these settings, for hints; of a section: none
    # Of an algorithm's section: its defaults of settings in other sections, by name.
    defaults: ClassVar[Mapping[str, object]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: object) -> object:
        """Expand `~`, which a shell leaves alone in a settings file and after `=`."""
        if isinstance(value, list | tuple):
            return type(value)(map(_expand, value))
        return _expand(value)

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

    @field_validator("*", mode="wrap")
    @classmethod
    def _can_be_computed_with(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        """Refuse a path of no text, which would be the current folder, and endless numbers."""
        found: object = handler(value)
        given, values = (x if isinstance(x, tuple | list) else (x,) for x in (value, found))
        for text, one in zip(given, values, strict=False):
            if text == "" and isinstance(one, Path):
                raise PydanticCustomError("value_error", "must not be empty")
            if isinstance(one, int) and abs(one) > LARGEST:
                raise PydanticCustomError("value_error", "must be below 2^63")
        return found


@dataclass(frozen=True)
class SettingField:
    """One setting in its section."""

    section: str
    name: str
    info: FieldInfo

    @property
    def positional(self) -> Positional | None:
        """How it is named, if it is set without a flag."""
        return find_mark(self.info, Positional)

    @property
    def flag(self) -> str:
        """The flag that sets it, or the name of its place."""
        if self.positional is not None:
            return self.positional.name
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """The flag that sets a setting."""
    return "--" + name.replace("_", "-")


def changed_flags(section: Settings, names: Iterable[str]) -> list[str]:
    """Flags of settings, by name, that were given another value than their default."""
    flags = []
    for name in sorted(section.model_fields_set.intersection(names)):
        info, value = type(section).model_fields[name], getattr(section, name)
        if value != info.get_default():
            off = find_mark(info, OffFlag) if value is False else None
            flags.append(off.flag if off else flag_of(name))
    return flags


def refuse_unread(section: Settings, names: Iterable[str], where: str) -> None:
    """Refuse values that nothing reads.

    Args:
        section: Of the settings.
        names: Of the settings.
        where: Such as "without `--evaluate-prompts`".

    Raises:
        ValueError: Some of the settings have another value than their default.
    """
    flags = changed_flags(section, names)
    if flags:
        verb = "has" if len(flags) == 1 else "have"
        raise ValueError(f"{', '.join(f'`{x}`' for x in flags)} {verb} no effect {where}")


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


def fill_in_defaults(settings: Settings, defaults: Mapping[str, object]) -> None:
    """Give settings in any section other defaults; they count as not given, as before."""
    for name in type(settings).model_fields:
        section: Settings = getattr(settings, name)
        given = section.model_fields_set
        changed = {
            key: value
            for key, value in defaults.items()
            if key in type(section).model_fields and key not in given
        }
        if changed:
            checked = type(section).model_validate(
                {**section.model_dump(exclude_unset=True), **changed}
            )
            checked.model_fields_set.difference_update(changed)
            object.__setattr__(settings, name, checked)


def _expand(value: object) -> object:
    """The home folder in place of a leading `~`."""
    is_below_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return f"{Path.home()}{str(value)[1:]}" if is_below_home else value


def find_mark(info: FieldInfo, kind: type[Mark]) -> Mark | None:
    """The mark of a kind that a setting is annotated with, if any."""
    return next((mark for mark in info.metadata if isinstance(mark, kind)), None)


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The values that a setting may have, where they are few."""
    listed, key = find_mark(info, ListOf), find_mark(info, KeyOf)
    if listed and listed.choices:
        return listed.choices
    return tuple(key.table if key else ()) or tuple(map(str, _choices(info.annotation)))


def _choices(annotation: Any) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        yield from (member.value for member in annotation)
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _printable(text: str) -> str:
    """The text, its bytes that are not UTF-8 escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def path_error(
    path: Path, problem: str, *, hint: str | None = None, flag: str | None = None
) -> PydanticCustomError:
    """A path that cannot be used, to raise in a validator.

    Args:
        path: As it was given.
        problem: The rest of a sentence that begins with it.
        hint: Reaches the user.
        flag: That names the path, for a check of several settings together.
    """
    return PydanticCustomError(
        "path",
        "`{path}` {problem}",
        {"path": _printable(str(path)), "problem": problem, "hint": hint, "flag": flag},
    )


def not_a_choice(value: str, choices: Sequence[str]) -> PydanticCustomError:
    """A value that is none of a few, to raise in a validator."""
    return PydanticCustomError(
        "choice", "must be {choices}", {"choices": join_choices(choices), "given": value}
    )


def join_choices(choices: Sequence[str]) -> str:
    """Such as "`a`, `b` or `c`"."""
    *others, last = (f"`{choice}`" for choice in choices)
    return f"{', '.join(others)} or {last}" if others else last


def missing_path(path: Path, *, hint: str | None = None, flag: str | None = None) -> Exception:
    """The error of a path that leads nowhere; its hint has how much of it exists."""
    there = _printable(str(find_existing(path)))
    hint = hint or f"Correct the path: of it, only `{there}` exists"
    return path_error(path, "does not exist", hint=hint, flag=flag)


def _check_folder(folder: Path) -> Path:
    if not folder.exists():
        raise missing_path(folder)
    if not folder.is_dir():
        above = _printable(str(folder.parent))
        raise path_error(folder, "is not a folder", hint=f"Pass its folder, `{above}`")
    return folder


def _check_folders(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(map(_check_folder, folders))


def _check_data(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(x if is_conversations(x) else _check_folder(x) for x in paths)


def check_float8_products(gemm_dtype: str, *, compute_dtype: str, kernels: str) -> None:
    """Raise ValueError for settings that exclude float8 products."""
    for flag, value, excluded in (
        ("--kernels", kernels, "plain"),
        ("--compute-dtype", compute_dtype, "float32"),
    ):
        if gemm_dtype == "float8" and value == excluded:
            raise ValueError(f"`--gemm-dtype float8` and `{flag} {value}` cannot both be given")


def is_conversations(path: Path) -> bool:
    """Whether a path is a file of conversations, which is rendered into tokens."""
    return path.suffix.lower() in CONVERSATION_SUFFIXES and path.is_file()


def _as_list(value: object) -> object:
    """One path, as one naturally writes it in a settings file, for a list of one."""
    return (value,) if isinstance(value, str | Path) else value


def _read_number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _split(value: object) -> object:
    """Layer ids from text, with commas or spaces between them."""
    if not isinstance(value, str):
        return value
    parts = re.split(r"[,\s]+", value.strip().removeprefix("[").removesuffix("]").strip())
    if not all(re.fullmatch(r"-?\d{1,9}", part) for part in parts):
        raise ValueError(f"must be whole numbers such as `3,17,30`, got `{_printable(value)}`")
    return tuple(parts)


def _check_layer_ids(ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if ids is not None and (
        any(low >= high for low, high in pairwise(ids)) or min(ids, default=-1) < 0
    ):
        given = ",".join(map(str, ids))
        raise ValueError(f"must be strictly ascending and not negative, got `{given}`")
    return ids


# A folder that must exist, folders, a data format and its version, layer ids: as a flag gives them.
Folder = Annotated[Path, AfterValidator(_check_folder)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_as_list), AfterValidator(_check_folders)]
# Folders, or a file of conversations.
DataPaths = Annotated[tuple[Path, ...], BeforeValidator(_as_list), AfterValidator(_check_data)]
DataFormat = Annotated[
    Literal["auto", "pt", "speculators", "specforge"],
    Field(description="Format of the samples; auto detects it from the files"),
]
FormatVersion = Annotated[
    Literal[0, 1],
    BeforeValidator(_read_number),
    Field(description="Format version of `.pt` samples"),
]
TrustRemoteCode = Annotated[
    bool, Field(description="Allow Python code from the verifier's repository to run")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Field(description="Device to run on; auto is a GPU if there is one"),
]
VerifierDtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    Field(description="Precision of the verifier; auto is bfloat16 on GPU and float32 on CPU"),
]
ComputeDtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    Field(
        description="Compute precision of the layers; auto is bfloat16 on GPU and float32 on CPU; "
        "weights and optimizer state are always float32"
    ),
]
ComputeInFloat8 = Annotated[
    Literal["auto", "float8"],
    Field(
        description="Precision of the verifier's matrix products; float8 is e4m3, scaled by token "
        "and output, for verifiers that are served in float8; auto is that of its weights"
    ),
]
GemmDtype = Annotated[
    Literal["auto", "float8"],
    Field(
        description="Precision of the draft's matrix products in training steps; float8 is e4m3, "
        "scaled by row, forward and backward, and needs the fast kernels in bfloat16 on a recent "
        "GPU; auto is the compute dtype; sums, weights and optimizer state are always float32"
    ),
]
Kernels = Annotated[
    Literal["auto", "plain", "fast"],
    Field(
        description="Implementation of the training step; fast computes only the positions that "
        "reach the loss, in Triton kernels; plain computes every position, with Triton only for "
        "attention and noise on GPU; auto is fast where supported"
    ),
]
Sharding = Annotated[
    Literal["auto", "shard", "replicate"],
    Field(
        description="Placement of weights and optimizer state: shard across all ranks, or "
        "replicate on each rank; auto shards across the ranks of each machine, unless the draft "
        "is small"
    ),
]
TotalSeqLen = Annotated[int, Field(ge=2, description="Length of a packed sequence, in tokens")]
MaxBadSamples = Annotated[
    int | None,
    Field(
        ge=0,
        description="Maximum number of invalid samples to leave out; default: 1% of the folder",
    ),
]
LayerIdsSetting = Annotated[
    tuple[int, ...] | None, BeforeValidator(_split), AfterValidator(_check_layer_ids)
]


def write_settings(settings: Settings, file: Path) -> None:
    """Write all settings, defaults included, so that `--config` accepts them back."""
    with replacing(file) as temporary:
        write_json(settings.model_dump(mode="json"), temporary)


def changes_on_resume(
    old: Mapping[str, Any], new: Settings, *, unread: Collection[str] = ()
) -> list[Change]:
    """Settings that matter to a resumed run and differ from those it began with.

    Args:
        old: Values by section.
        new: Those of now.
        unread: Sections that the run does not read.
    """
    current = new.model_dump(mode="json")
    changes: list[Change] = []
    for field in setting_fields(type(new)):
        if field.section in unread:
            continue
        mark = find_mark(field.info, OnResume)
        now = current[field.section][field.name]
        # A run begun before there was such a setting did what is now its default.
        before = old.get(field.section, {}).get(field.name, field.info.get_default())
        if MODEL_NAME in field.info.metadata and isinstance(before, str):
            before = _absolute(before)
        is_known = any(change.name == field.flag for change in changes)
        if mark is not None and before != now and not is_known:
            changes.append(Change(field.flag, before, now, mark.change))
    return changes
