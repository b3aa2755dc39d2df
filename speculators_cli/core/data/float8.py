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
SCALED_AT_ONCE = 2**24  # values, to bound memory


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
        codes = torch.empty((len(indices), self.shape[1]), dtype=torch.float8_e4m3fn)
        self.read_codes(codes.view(torch.uint8).numpy(), indices)
        return scale_rows(codes, self.scales[torch.from_numpy(indices)])

    def split(self, num_rows: int) -> Iterator["Tensor"]:
        """Yield all rows scaled, `num_rows` at a time."""
        for start in range(0, len(self), num_rows):
            yield self[start : start + num_rows]

    def read_codes(
        self,
        into: Bytes,  # [rows, hidden], each row contiguous
        rows: NDArray[np.int64],  # [rows]
    ) -> None:
        """Read rows of float8 values, as bytes, directly into their destination.

        Raises:
            ChangedSampleError: The file ends too early, or cannot be read.
        """
        import torch

        if isinstance(self.values, StoredStates):
            self.values.read_into(into, rows)
        else:
            into[:] = self.values.view(torch.uint8).numpy()[rows]


def scale_rows(
    codes: "Tensor",  # [rows, ..., hidden], float8_e4m3fn, on any device
    scales: "Tensor",  # [rows, ..., 1], float32
) -> "Tensor":
    """Multiply in float32, and round once; [rows, ..., hidden], bfloat16."""
    import torch

    products = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    at_once = max(SCALED_AT_ONCE // max(codes[:1].numel(), 1), 1)
    for start in range(0, len(codes), at_once):
        part = slice(start, start + at_once)
        # bfloat16 has every value of float8.
        torch.mul(codes[part].bfloat16(), scales[part], out=products[part])
    return products


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
