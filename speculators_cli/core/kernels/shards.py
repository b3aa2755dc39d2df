"""Tensors of which each rank has some rows, recognized without importing their class.

That import takes a second, and one rank has none of them.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local_rows(tensor: Tensor) -> Tensor:
    """Return the rows of this rank."""
    return tensor.to_local() if is_shard(tensor) else tensor
