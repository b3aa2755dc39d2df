"""What no test needs to wait for; and the interpreter's float8 rounds as a GPU's does."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np
import torch


def speed_up() -> None:
    """Write without waiting for the disk, and interpret kernels in a quarter of the time."""
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
    _round_float8(interpreter)
    _keep_types(interpreter)
    _skip_broadcasts(interpreter.TritonSemantic)


def _keep_types(interpreter: Any) -> None:
    """Compute what a type consists of once: each value of a kernel makes its own."""
    import triton.language as tl

    tensor, block_type, find_dtype = tl.tensor, tl.block_type, interpreter._get_np_dtype
    fill_type = _fill_once(
        block_type.__init__, lambda element, shape: (element.name, *map(str, shape))
    )
    fill_tensor = _fill_once(tensor.__init__, lambda _, kind: kind.name)
    dtypes: dict[str, Any] = {}

    def fill_tensor_with(value: Any, handle: Any, kind: Any) -> None:
        fill_tensor(value, handle, kind)
        value.handle = handle

    def find_dtype_once(kind: Any) -> Any:
        if kind.name not in dtypes:
            dtypes[kind.name] = find_dtype(kind)
        return dtypes[kind.name]

    block_type.__init__, tensor.__init__ = fill_type, fill_tensor_with
    interpreter._get_np_dtype = find_dtype_once


def _fill_once(fill: Callable[..., None], key_of: Callable[..., object]) -> Callable[..., None]:
    """Return an `__init__` that copies what it did when its arguments had the same key."""
    filled: dict[object, dict[str, Any]] = {}

    def fill_or_copy(value: object, *given: Any) -> None:
        key = key_of(*given)
        if key not in filled:
            fill(value, *given)
            filled[key] = {**vars(value)}
        vars(value).update(filled[key])

    return fill_or_copy


def _skip_broadcasts(semantic: Any) -> None:
    """Leave out the search for the common shape of two values that have it."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_unequal(self: Any, left: Any, right: Any) -> Any:
        kinds = left.type, right.type
        if all(kind.is_block() for kind in kinds) and [*kinds[0].shape] == [*kinds[1].shape]:
            return left, right
        return broadcast(self, left, right)

    semantic.broadcast_impl_value = broadcast_unequal


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


def _round_float8(interpreter: Any) -> None:
    """Convert float32 to e4m3 and back as PyTorch does: the interpreter truncates."""
    import triton.language as tl

    convert_others = interpreter._convert_float
    dtypes = {tl.float32: torch.float32, tl.float8e4nv: torch.float8_e4m3fn}

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if {source, target} != set(dtypes):
            return convert_others(values, source, target, rounding_mode)
        bits = {4: np.int32, 1: np.uint8}
        own = torch.from_numpy(np.ascontiguousarray(values).view(bits[values.itemsize]))
        found = own.view(dtypes[source]).to(dtypes[target])
        return found.view(torch.uint8 if target == tl.float8e4nv else torch.int32).numpy()

    interpreter._convert_float = convert
