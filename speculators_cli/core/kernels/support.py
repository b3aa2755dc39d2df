"""Support for the fast kernels, which compute the same as the plain path, on a recent GPU."""

import os
from importlib.util import find_spec

import torch

from speculators_cli.core.errors import MachineError
from speculators_cli.core.kernels.causal_attention import can_use_flash


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
