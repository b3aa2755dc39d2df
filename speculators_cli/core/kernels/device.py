"""The device of tensors: transfers to it, and what computes there."""

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to the device, without synchronizing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels compute with a tensor: on a GPU, or in a rehearsal on the meta device."""
    return tensor.is_cuda or tensor.is_meta


def make_generator(device: torch.device, seed: int) -> torch.Generator | None:
    """Return a random generator; None for the meta device, which has no values."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
