"""What no test needs to wait for."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any


def speed_up() -> None:
    """Write without waiting for the disk, and interpret kernels in half of the time."""
    os.fsync = _leave_to_the_system  # type: ignore[assignment]
    _speed_up_interpreter()


def _leave_to_the_system(_: object) -> None:
    """No test cuts the power."""


def _speed_up_interpreter() -> None:
    """Leave out what Triton's interpreter repeats, where it is the one that runs kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # not in old versions
        _patch_once(interpreter)
    # It computes each sum and product of integers again in 64 bits, to compare.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_once(interpreter: Any) -> None:
    """Replace the functions of the language once a launch, not for each call within a kernel."""
    import triton.language as tl

    patch, make_scope = interpreter._patch_lang, interpreter._LangPatchScope
    patched: set[tuple[bool, ...]] = set()

    @cache
    def languages_of(function: FunctionType) -> tuple[bool, ...]:
        names = [id(x) for x in function.__globals__.values()]
        return tuple(id(language) in names for language in (tl, tl.core))

    def restore_all(restore: Callable[[], None]) -> None:
        patched.clear()
        restore()

    def patch_unless_done(function: FunctionType) -> Any:
        languages = languages_of(function)
        if languages in patched:
            return make_scope()
        is_launch = not patched
        patched.add(languages)
        scope = patch(function)
        if is_launch:
            scope.restore = partial(restore_all, scope.restore)
        return scope

    interpreter._patch_lang = patch_unless_done
