"""Importing what a command computes with."""

import gc
from importlib import import_module

import pytest

from speculators_cli.cli.imports import importing


def test_no_garbage_is_looked_for_while_modules_are_imported() -> None:
    with importing():
        is_looked_for = gc.isenabled()

    assert not is_looked_for
    assert gc.isenabled()


def test_garbage_is_looked_for_again_after_an_import_that_failed() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        import_module("no_such_module")

    assert gc.isenabled()
