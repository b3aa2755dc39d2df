"""Importing what a command computes with."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import heavy libraries in the block: no garbage is looked for, since modules are none.

    Torch and transformers make some 400,000 objects, and each search goes through all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
