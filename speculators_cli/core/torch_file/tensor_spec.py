"""A tensor in a file, by its storage, dtype, shape and strides."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

# By torch's dtype names, so that listing the tensors of a file does not import torch.
ITEM_BYTES = {
    "bfloat16": 2,
    "bool": 1,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "int8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "uint8": 1,
}
FLOATS = ("float64", "float32")  # each represents every value of narrower dtypes


@dataclass(frozen=True)
class TensorSpec:
    """A strided view of a storage in the file. Sizes are in elements."""

    storage_key: str
    dtype: str  # a key of `ITEM_BYTES`
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor, by its shape."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor, by its shape."""
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        if self.num_elements == 0:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def columns(self, start: int, stop: int) -> "TensorSpec":
        """Return columns of a matrix, as a view."""
        rows = self.shape[0]
        offset = self.offset + start * self.stride[1]
        shape = (rows, stop - start)
        return TensorSpec(self.storage_key, self.dtype, offset, shape, self.stride)

    def without_batch(self, num_dimensions: int) -> "TensorSpec":
        """Return the view without leading dimensions of 1, which some generators keep.

        Args:
            num_dimensions: Minimum to keep: the dimensions of a single token are 1, too.
        """
        shape, stride = self.shape, self.stride
        while len(shape) > num_dimensions and shape[0] == 1:
            shape, stride = shape[1:], stride[1:]
        return TensorSpec(self.storage_key, self.dtype, self.offset, shape, stride)


def find_common(dtypes: Iterable[str]) -> str:
    """Return the narrowest float dtype that represents every value of the given ones."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    # bfloat16 and float16 have values that the other lacks.
    return next((dtype for dtype in FLOATS if dtype in distinct), "float32")
