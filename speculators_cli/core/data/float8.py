"""Hidden states as float8 values, with one float32 scale per token."""

from collections.abc import Iterator
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
NAN_CODE = 0x7F  # of float8_e4m3fn, without the sign
HALF_FACTOR = 2.0**8  # the exponent bias of float16 is larger by 8
HALF_FIELDS = -1 - 0x4000  # mask of all bits of a float16 but the highest of its exponent
SCALED_AT_ONCE = 2**17  # values, whose buffers fit into a core's cache


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

        at_once = max(SCALED_AT_ONCE // self.shape[1], 1)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            scales = self.scales[torch.from_numpy(part)]
            scale_values(self._read_bytes(part), scales, into[start : start + at_once])

    def _read_bytes(self, rows: NDArray[np.int64]) -> Bytes:
        import torch

        if isinstance(self.values, StoredStates):
            values = np.empty((len(rows), self.shape[1]), np.uint8)
            self.values.read_into(values, rows)
            return values
        codes: Bytes = self.values.view(torch.uint8).numpy()
        return codes[rows]


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
    scales = (largest / MAX_FLOAT8).clamp_(min=MIN_SCALE)
    return (states.float() / scales).to(torch.float8_e4m3fn), scales.squeeze(-1)


def scale_values(
    codes: Bytes,  # [rows, hidden]: bytes of float8_e4m3fn
    scales: "Tensor",  # [rows, 1], float32
    into: "Tensor",  # [rows, hidden], bfloat16
) -> None:
    """Multiply float8 values with their scales, in float32, and round the products.

    The fields of a float8_e4m3fn are moved to those of a float16, which has wider ones: an eighth
    of the time of torch's conversion.
    """
    import torch

    fields = codes.view(np.int8).astype(np.int16)
    fields *= 2**7  # the extended sign is now in the two highest bits
    fields &= HALF_FIELDS
    products = torch.from_numpy(fields).view(torch.float16).float().mul_(scales * HALF_FACTOR)
    magnitudes = codes & np.uint8(NAN_CODE)
    if magnitudes.size and magnitudes.max() == NAN_CODE:
        products[torch.from_numpy(magnitudes == NAN_CODE)] = torch.nan
    into.copy_(products)
