"""Nothing of this folder can be imported without Triton, which is made for Linux alone."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture
def round_by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let kernels round to float8 from now on, as on a GPU."""
    from speculators_cli.core.kernels import factors, float8

    def start() -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles its kernels: tests/gpu/ runs them")
        for module in (factors, float8):
            monkeypatch.setattr(module, "has_kernels", lambda _x: True)

    return start
