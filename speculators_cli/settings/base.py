"""Settings: frozen, checked once, read from a file under the flags."""

import difflib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from speculators_cli.core.errors import SettingsError


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


class Settings(BaseModel):
    """Base of all settings classes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)


def path_error(path: Path, problem: str, *, hint: str | None = None) -> PydanticCustomError:
    """A path that cannot be used, to raise in a validator; `hint` reaches the user."""
    return PydanticCustomError(
        "path", "`{path}` {problem}", {"path": str(path), "problem": problem, "hint": hint}
    )
