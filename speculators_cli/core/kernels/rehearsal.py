"""Compiling kernels in threads, before they are launched."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from speculators_cli.core.kernels.launch import in_place_of_launches


@contextmanager
def rehearsing(num_threads: int, *, prepare_thread: Callable[[], None]) -> Iterator[None]:
    """Compile and load what the block would launch, each kernel once; nothing is launched.

    Tensors may be on the meta device: what is compiled depends on dtypes, strides and alignment.

    Args:
        num_threads: That compile; most of it holds no global lock of Python.
        prepare_thread: Called in each thread that compiles.
    """
    found: dict[Hashable, Future[object]] = {}
    with ThreadPoolExecutor(num_threads, "compile", initializer=prepare_thread) as threads:

        def rehearse(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
            key = (id(kernel), *map(describe, args), *sorted(options.items()))
            if key in found:
                return
            is_first = not found
            found[key] = threads.submit(_load, kernel, grid, args, options)
            if is_first:
                found[key].result()  # alone: it sets up what all of them share

        with in_place_of_launches(rehearse):
            yield
    for kernel in found.values():
        kernel.result()


def _load(
    kernel: Any, grid: tuple[int, ...], args: tuple[object, ...], options: dict[str, object]
) -> object:
    # Reading `run` loads the binary, and builds what launches it.
    return kernel.warmup(*args, grid=grid, **options).run


def describe(argument: object) -> Hashable:
    """Return what of an argument Triton compiles a kernel for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        return argument == 1, argument % 16 == 0, argument.bit_length() < 32
    return type(argument).__name__
