"""HostCopy: the state of a checkpoint in host memory, while training changes it on the device."""

from collections.abc import Iterable

import torch
from torch import Tensor

from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import format_bytes

MIN_PINNED_BYTES = 2**20  # smaller tensors share pages with others


class HostCopy:
    """Copies tensors into host memory that is allocated once; pinned, if they are on a GPU.

    The memory is page-locked at its exact size: PyTorch's own allocator of pinned memory rounds up
    to powers of two. Where the system refuses to lock it, copies are only slower.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._pinned: list[Tensor] = []

    def reserve(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Allocate memory for tensors of these names, shapes and dtypes.

        Raises:
            MachineError: The machine is out of memory.
        """
        for name, tensor in named:
            if name not in self._tensors:
                self._tensors[name] = self._allocate(tensor)

    def copy(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of tensors by name; valid until the next call with the same names.

        Args:
            named: Names with tensors, whose shapes and dtypes never change.

        Raises:
            MachineError: The machine is out of memory.
        """
        copies: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in named:
            self.reserve([(name, tensor)])
            memory = self._tensors[name]
            assert (memory.shape, memory.dtype) == (tensor.shape, tensor.dtype), "they never change"
            copies[name] = memory.copy_(tensor.detach(), non_blocking=True)
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def close(self) -> None:
        """Give up the memory; copies are no longer valid."""
        for tensor in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._pinned.clear()
        self._tensors.clear()

    def _allocate(self, like: Tensor) -> Tensor:
        try:
            memory = torch.empty(like.shape, dtype=like.dtype)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise MachineError(
                "The machine is out of memory: the copy of a checkpoint needs another "
                f"{format_bytes(like.nbytes)}",
                hint="Free host memory; `--plan` prints the size of a checkpoint",
            ) from None
        if like.is_cuda and memory.nbytes >= MIN_PINNED_BYTES:
            # A thread begins with the first GPU as its own.
            with torch.cuda.device(like.device):
                refused = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
            if not int(refused):
                self._pinned.append(memory)
        return memory
