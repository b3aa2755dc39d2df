"""Settings of vLLM in a process of its own, for the commands that run it."""

from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

VLLMPython = Annotated[
    Path | None, Field(description="Python interpreter with vLLM; default: this one")
]
TensorParallelSize = Annotated[int, Field(ge=1, description="GPUs of one vLLM engine")]
VLLMArgs = Annotated[
    str,
    Field(description="More engine arguments of vLLM, as on its command line, in quotes"),
]


class HasVLLM(Protocol):
    """A section with these settings."""

    @property
    def vllm_python(self) -> Path | None:
        """Interpreter."""

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs."""

    @property
    def vllm_args(self) -> str:
        """Arguments."""


def refuse_without_vllm(section: HasVLLM) -> None:
    """Refuse settings of vLLM where it does not run.

    Raises:
        ValueError: Some are set.
    """
    if section.vllm_python is not None or section.tensor_parallel_size > 1 or section.vllm_args:
        raise ValueError(
            "`--vllm-python`, `--tensor-parallel-size` and `--vllm-args` need `--engine vllm`"
        )
