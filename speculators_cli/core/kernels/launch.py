"""Launching a kernel, or, in a rehearsal, compiling what would be launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

# Called with kernel, grid and arguments in place of a launch, in this thread.
Rehearse = Callable[..., None]
_REHEARSE: ContextVar[Rehearse | None] = ContextVar("rehearse", default=None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """Return what launches a Triton kernel with given arguments."""
    rehearse = _REHEARSE.get()
    return kernel[grid] if rehearse is None else partial(rehearse, kernel, grid)


@contextmanager
def in_place_of_launches(rehearse: Rehearse) -> Iterator[None]:
    """Call a function for each launch of this thread in the block."""
    token = _REHEARSE.set(rehearse)
    try:
        yield
    finally:
        _REHEARSE.reset(token)
