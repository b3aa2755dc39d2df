"""Hidden states as float8 values, with one float32 scale per token."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
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
READ_AT_ONCE = 2**20  # values: a call costs as much as reading some thousand
SCALED_AT_ONCE = 2**18  # values, so that intermediate results stay in a core's cache
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

        factors = self.scales[torch.from_numpy(rows)] * HALF_FACTOR
        width = self.shape[1]
        at_once = max(READ_AT_ONCE // width, 1)
        scratch = _own_scratch(at_once * width)
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            codes = scratch.codes[: len(rows[part]) * width].reshape(-1, width)
            self._read_codes(codes, rows[part])
            scale_codes(codes, factors[part], into[part], scratch)

    def _read_codes(self, codes: Bytes, rows: NDArray[np.int64]) -> None:
        import torch

        if isinstance(self.values, StoredStates):
            self.values.read_into(codes, rows)
        else:
            codes[:] = self.values.view(torch.uint8).numpy()[rows]


@dataclass(frozen=True, eq=False)
class Scratch:
    """Reusable memory for some values: allocating it costs more than the computation."""

    codes: Bytes  # bytes of float8_e4m3fn
    magnitudes: Bytes
    halves: NDArray[np.int16]  # bits of float16
    products: "Tensor"  # float32


def _own_scratch(num_values: int) -> Scratch:
    """Return the scratch memory of this thread."""
    import torch

    scratch: Scratch | None = getattr(_local, "scratch", None)
    if scratch is None or len(scratch.codes) < num_values:
        codes, magnitudes = np.empty(num_values, np.uint8), np.empty(num_values, np.uint8)
        scratch = Scratch(
            codes, magnitudes, np.empty(num_values, np.int16), torch.empty(num_values)
        )
        _local.scratch = scratch
    return scratch


def scale_codes(
    codes: Bytes,  # [rows, hidden]: bytes of float8_e4m3fn
    factors: "Tensor",  # [rows, 1], float32: scales times `HALF_FACTOR`
    into: "Tensor",  # [rows, hidden], bfloat16
    scratch: Scratch,
) -> None:
    """Multiply float8 values with their scales, in float32, and round the products.

    The fields of a float8_e4m3fn are moved to those of a float16, which are wider: this takes an
    eighth of the time of torch's own conversion.
    """
    import torch

    num_rows, width = codes.shape
    at_once = max(SCALED_AT_ONCE // width, 1)
    for start in range(0, num_rows, at_once):
        part = slice(start, start + at_once)
        some = codes[part]
        halves = scratch.halves[: some.size].reshape(some.shape)
        np.copyto(halves, some.view(np.int8))
        np.multiply(halves, 2**7, out=halves)  # the extended sign is now in the two highest bits
        np.bitwise_and(halves, HALF_FIELDS, out=halves)
        products = scratch.products[: some.size].view(some.shape)
        products.copy_(torch.from_numpy(halves).view(torch.float16)).mul_(factors[part])
        into[part].copy_(products)
    magnitudes = scratch.magnitudes[: codes.size].reshape(codes.shape)
    np.bitwise_and(codes, NAN_CODE, out=magnitudes)
    if magnitudes.max(initial=0) == NAN_CODE:
        into[torch.from_numpy(magnitudes == NAN_CODE)] = torch.nan


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
