"""Where the hidden states of a training run come from."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from speculators_cli.settings.base import (
    REFUSED_ON_RESUME,
    ComputeInFloat8,
    Settings,
    VerifierDtype,
)
from speculators_cli.settings.vllm import VLLMArgs, VLLMPython

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _read_size(value: object) -> object:
    """Bytes from text such as `2TB`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in UNITS:
        raise ValueError("must be a size such as `500GB` or `2TB`")
    return int(float(match[1]) * UNITS[match[2].upper()])


class CaptureSettings(Settings):
    """Hidden states that are stored, or computed by the verifier while training."""

    capture: Literal["auto", "stored", "online"] = Field(
        "auto",
        description="Source of the hidden states: stored in the samples, or computed online by the "
        "verifier in each step; auto is online for a folder with tokens only",
    )
    capture_dtype: VerifierDtype = Field(
        "auto",
        description="Precision of the verifier in online capture; auto is bfloat16 on GPU and "
        "float32 on CPU",
    )
    capture_compute_dtype: ComputeInFloat8 = "auto"
    capture_engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="Engine of online capture: transformers in the ranks, or vllm in a process of "
        "its own, on GPUs that no rank trains on",
    )
    capture_gpus: int = Field(
        1,
        ge=1,
        description="GPUs of the machine for vLLM, the last visible ones, which share each layer",
    )
    vllm_python: VLLMPython = None
    vllm_args: VLLMArgs = ""
    shard_verifier: bool = Field(
        False,
        description="Shard the verifier's layers across the GPUs of a machine in online capture, "
        "for one that does not fit on each",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder that keeps hidden states computed online, for later epochs and runs",
    )
    cache_size: Annotated[int | None, BeforeValidator(_read_size)] = Field(
        None,
        ge=0,
        description="Size of the cache, such as 500GB or 2TB; validation samples are kept first; "
        "default: all samples",
    )
    cache_dtype: Annotated[Literal["bfloat16", "float8"] | None, REFUSED_ON_RESUME] = Field(
        None,
        description="Precision of cached hidden states, to which all computed ones are rounded; "
        "float8 is e4m3 with a scale per token and layer; default: that of the verifier",
    )

    @property
    def in_float8(self) -> bool:
        """Whether the verifier's layers multiply in float8."""
        return self.capture_compute_dtype == "float8"

    @property
    def is_apart(self) -> bool:
        """Whether other processes than the ranks compute hidden states."""
        return self.capture_engine == "vllm"

    @model_validator(mode="after")
    def _engine_has_its_flags(self) -> Self:
        if self.is_apart:
            if self.shard_verifier or self.capture_compute_dtype != "auto":
                raise ValueError(
                    "`--shard-verifier` and `--capture-compute-dtype` need "
                    "`--capture-engine transformers`"
                )
        elif self.capture_gpus > 1 or self.vllm_python is not None or self.vllm_args:
            raise ValueError(
                "`--capture-gpus`, `--vllm-python` and `--vllm-args` need `--capture-engine vllm`"
            )
        return self

    @model_validator(mode="after")
    def _cache_has_a_folder(self) -> Self:
        given = {"--cache-size": self.cache_size, "--cache-dtype": self.cache_dtype}
        flags = [f"`{flag}`" for flag, value in given.items() if value is not None]
        if self.shard_verifier and self.capture_compute_dtype != "auto":
            raise ValueError("`--capture-compute-dtype` does not work with `--shard-verifier`")
        if self.cache_dir is None and flags:
            raise ValueError(f"{', '.join(flags)} needs `--cache-dir`")
        if self.cache_dir is not None and self.capture == "stored":
            raise ValueError("`--cache-dir` is of no use with `--capture stored`")
        return self
