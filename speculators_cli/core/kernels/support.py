"""Support for the fast kernels, which compute the same as the plain path, and for float8."""

import os
from importlib.util import find_spec

import torch

from speculators_cli.core.errors import MachineError
from speculators_cli.core.kernels.causal_attention import can_use_flash
from speculators_cli.core.reading import first_line


def use_fast_kernels(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    unsupported: str | None = None,
) -> bool:
    """Resolve `--kernels`.

    Args:
        setting: `auto`, `plain` or `fast`.
        device: Where the draft computes.
        dtype: The compute dtype.
        head_dim: Of the draft's attention.
        unsupported: What of the draft's settings the fast kernels do not compute; None: nothing.

    Raises:
        MachineError: `fast` was requested where it is not supported.
    """
    if setting == "plain":
        return False
    reason = unsupported or why_not_fast(device)
    if setting == "fast" and reason is not None:
        raise MachineError(
            f"`--kernels fast`: {reason}", hint="Pass `--kernels auto` or `--kernels plain`"
        )
    # In float32, or with head sizes that FlashAttention lacks, attention would be slower.
    is_worth_it = can_use_flash(device, dtype, head_dim)
    return reason is None and (setting == "fast" or is_worth_it)


def use_float8_products(
    setting: str, device: torch.device, *, unsupported: str | None = None
) -> bool:
    """Resolve `--gemm-dtype`; float8 implies the fast kernels.

    Args:
        setting: `auto` or `float8`.
        device: Where the draft computes.
        unsupported: What of the draft's settings the fast kernels do not compute; None: nothing.

    Raises:
        MachineError: float8 was requested where it is not supported.
    """
    if setting != "float8":
        return False
    hint = "Leave out `--gemm-dtype float8`"
    reason = unsupported or why_not_fast(device)
    if reason is not None:
        raise MachineError(f"`--gemm-dtype float8` needs the fast kernels: {reason}", hint=hint)
    # On another device, tests have float32 products of what was rounded.
    reason = why_not_float8(device) if device.type == "cuda" else None
    if reason is not None:
        raise MachineError(f"`--gemm-dtype float8`: {reason}", hint=hint)
    return True


def why_not_float8(device: torch.device) -> str | None:
    """Return why a device cannot multiply float8 matrices with a scale per row; None if it can.

    It is tried: support depends on the versions of torch and CUDA, too. A CPU can with torch 2.13,
    slowly, and not with 2.11.
    """
    values = torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(values, values.T, scales, scales.T, out_dtype=torch.bfloat16)  # noqa: SLF001
    except (RuntimeError, ValueError) as error:
        place = "this CPU"
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            place = f"this GPU of compute capability {major}.{minor}"
        return (
            f"torch {torch.__version__} cannot multiply in float8 with a scale per row on {place}: "
            f"{first_line(error)}"
        )
    return None


def why_not_fast(device: torch.device) -> str | None:
    """Return why the fast kernels are not supported on a device; None if they are."""
    if find_spec("triton") is None:
        return "the package `triton` is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs them on any device, for tests
    if device.type != "cuda":
        return "they require a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"this GPU has compute capability {major}.{minor}, they require 8.0"
    return None
