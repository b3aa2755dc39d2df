"""Hidden states as float8 values, with one float32 scale per token."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.stored import StoredStates, find_rows
from speculators_cli.core.torch_file.open_file import Bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_FLOAT8 = 448.0  # of float8_e4m3fn
MIN_SCALE = 2.0**-126  # the smallest normal float32: smaller ones would be inexact, or zero
SCALED_AT_ONCE = 2**20  # values: with fewer, threads wait for the interpreter lock
_local = threading.local()


class ScaledStates:
    """Hidden states as float8_e4m3fn with one scale per row; the product is rounded once.

    Args:
        values: [seq_len, hidden], float8_e4m3fn: in a file, or in memory.
        scales: [seq_len, 1], float32.
    """

    def __init__(self, values: "StoredStates | Tensor", scales: "Tensor") -> None:
        self.values = values
        self.scales = scales
        self.shape = tuple(values.shape)

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of the products."""
        import torch

        return torch.bfloat16

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "slice | Tensor") -> "Tensor":
        """Read and scale rows."""
        import torch

        indices = find_rows(rows, len(self))
        products = torch.empty((len(indices), self.shape[1]), dtype=torch.bfloat16)
        self.read_into(products, indices)
        return products

    def split(self, num_rows: int) -> Iterator["Tensor"]:
        """Yield all rows scaled, `num_rows` at a time."""
        for start in range(0, len(self), num_rows):
            yield self[start : start + num_rows]

    def read_into(
        self,
        into: "Tensor",  # [rows, hidden], bfloat16, each row contiguous
        rows: NDArray[np.int64],  # [rows]
    ) -> None:
        """Scale rows directly into their destination.

        Raises:
            ChangedSampleError: The file ends too early, or cannot be read.
        """
        import torch

        scales = self.scales[torch.from_numpy(rows)]
        width = self.shape[1]
        at_once = max(SCALED_AT_ONCE // width, 1)
        scratch = _own_scratch(at_once * width)
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            num_values = len(rows[part]) * width
            self._read_codes(scratch.codes[:num_values].reshape(-1, width), rows[part])
            products = scratch.decode(num_values).view(-1, width).mul_(scales[part])
            into[part].copy_(products)

    def _read_codes(self, codes: Bytes, rows: NDArray[np.int64]) -> None:
        import torch

        if isinstance(self.values, StoredStates):
            self.values.read_into(codes, rows)
        else:
            codes[:] = self.values.view(torch.uint8).numpy()[rows]


@dataclass(frozen=True, eq=False)
class Scratch:
    """Reusable memory for an even number of values: allocating it costs more than the rest."""

    codes: Bytes  # bytes of float8_e4m3fn
    pairs: NDArray[np.intp]  # two codes each
    values: "Tensor"  # float32

    def decode(self, num_values: int) -> "Tensor":
        """Return the values of the first codes; [values], float32.

        Two at a time are looked up in a table, in a fifth of the time of torch's conversion. Each
        step takes the interpreter lock once, so that many threads rarely wait for it.
        """
        num_pairs = -(-num_values // 2)
        pairs = self.pairs[:num_pairs]
        np.copyto(pairs, self.codes[: 2 * num_pairs].view(np.uint16))
        found = self.values[: 2 * num_pairs].numpy().view(np.uint64)
        np.take(_table_of_pairs(), pairs, out=found, mode="clip")  # others copy the output
        return self.values[:num_values]


def _own_scratch(num_values: int) -> Scratch:
    """Return the scratch memory of this thread."""
    import torch

    scratch: Scratch | None = getattr(_local, "scratch", None)
    if scratch is None or len(scratch.codes) < num_values:
        size = num_values + num_values % 2
        scratch = _local.scratch = Scratch(
            np.zeros(size, np.uint8), np.empty(size // 2, np.intp), torch.empty(size)
        )
    return scratch


@cache
def _table_of_pairs() -> NDArray[np.uint64]:
    """Return the bits of two float32 values for each two float8 values; [2^16]."""
    import torch

    codes = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    return values.numpy().view(np.uint64)


def quantize_rows(
    states: "Tensor",  # [rows, hidden], any float dtype, on any device
) -> tuple["Tensor", "Tensor"]:
    """Quantize rows to float8, rounded to nearest, each with its own scale.

    The scale maps the largest magnitude of a row to the largest float8 value. That of a row with
    NaN or Inf is not finite.

    Returns:
        [rows, hidden], float8_e4m3fn; [rows], float32.
    """
    import torch

    largest = states.abs().amax(-1, keepdim=True).float()
    # By a tensor: a GPU would multiply with the reciprocal of a number, and round differently.
    scales = (largest / torch.full_like(largest, MAX_FLOAT8)).clamp_(min=MIN_SCALE)
    return (states.float() / scales).to(torch.float8_e4m3fn), scales.squeeze(-1)
