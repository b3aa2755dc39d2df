"""Hidden states in a file, whose rows are read on use, directly into their destination.

Nothing is memory-mapped: access to a mapped file that has shrunk would crash the process.
"""

import threading
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import BadSampleError, refusing_sample
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.open_file import Bytes, OpenFile
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_GAP_BYTES = 64 * 2**10  # smaller gaps between rows are read as well: a call costs more
MAX_SPREAD_BYTES = 2**30  # of a non-contiguous tensor, which is read completely
BLOCK_BYTES = 4 * 2**20  # copied once more through a buffer, of about the size of a core's cache
_local = threading.local()


class StoredStates:
    """Hidden states [seq_len, width] in a file, whose rows are read when indexed.

    Args:
        source: The file.
        dtype: A key of `ITEM_BYTES`.
        start: Byte offset of the first value.
        shape: Number of rows, and width.
        stride: Strides of rows and of values, in values; not negative.

    Raises:
        BadSampleError: The values are spread too widely.
    """

    def __init__(
        self,
        source: OpenFile,
        dtype: str,
        start: int,
        shape: tuple[int, int],
        stride: tuple[int, int],
    ) -> None:
        self.source = source
        self.dtype_name = dtype
        self.start = start
        self.shape = shape
        self.stride = stride
        self._item_bytes = ITEM_BYTES[dtype]
        self._width_bytes = shape[1] * self._item_bytes
        self._are_rows_whole = stride[1] == 1 or shape[1] <= 1
        if not self._are_rows_whole and self._num_spread_bytes > MAX_SPREAD_BYTES:
            raise BadSampleError(f"has hidden states spread over {self._num_spread_bytes:,} bytes")

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of the values."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: "slice | Tensor") -> "Tensor":
        """Read rows: by a slice, by ascending indices, or by a mask."""
        import torch

        indices = find_rows(rows, len(self))
        # As bytes: NumPy lacks some dtypes of torch.
        values = torch.empty((len(indices), self._width_bytes), dtype=torch.uint8)
        self.read_into(values.numpy(), indices)
        return values.view(self.dtype)

    def split(self, num_rows: int) -> Iterator["Tensor"]:
        """Yield all rows, `num_rows` at a time."""
        for start in range(0, len(self), num_rows):
            yield self[start : start + num_rows]

    @classmethod
    def of(cls, archive: Archive, spec: TensorSpec) -> "StoredStates":
        """Create hidden states of an archive, which are readable after it is closed."""
        rows, width = spec.shape
        row_stride, stride = spec.stride
        start = archive.locate(spec)
        return cls(archive.lend(), spec.dtype, start, (rows, width), (row_stride, stride))

    def beside(self, other: "StoredStates") -> "StoredStates | None":
        """Merge with layers whose rows are adjacent in the file; None if they are not."""
        is_beside = (
            (other.source, other.dtype_name) == (self.source, self.dtype_name)
            and (other.stride, len(other)) == (self.stride, len(self))
            and other.start == self.start + self.shape[1] * self.stride[1] * self._item_bytes
        )
        if not is_beside:
            return None
        shape = (len(self), self.shape[1] + other.shape[1])
        return StoredStates(self.source, self.dtype_name, self.start, shape, self.stride)

    def read_into(
        self,
        into: Bytes,  # [rows, width in bytes], each row contiguous
        rows: NDArray[np.int64],  # [rows]
    ) -> None:
        """Read rows directly into their destination; wide gaps between them are not read.

        Raises:
            ChangedSampleError: The file ends too early, or cannot be read.
        """
        if into.size:
            with refusing_sample():
                self._read_into(into, rows)

    def _read_into(self, into: Bytes, rows: NDArray[np.int64]) -> None:
        if not self._are_rows_whole:
            into[:] = self._whole[rows].view(np.uint8)
            return
        offsets = self.start + rows * (self.stride[0] * self._item_bytes)
        steps = np.diff(offsets)
        is_one_piece = into.flags.c_contiguous and bool((steps == self._width_bytes).all())
        span = int(offsets[-1] - offsets[0]) + self._width_bytes
        if is_one_piece:
            self.source.fill(into, int(offsets[0]))
        elif span <= BLOCK_BYTES and self._are_near(steps):
            self._read_block(into, rows, offsets, span)
        else:
            self._read_pieces(into, offsets)

    def _are_near(self, steps: NDArray[np.int64]) -> bool:
        """Whether rows have a constant positive distance, without wide gaps."""
        gaps = steps - self._width_bytes
        return bool(((gaps >= 0) & (gaps <= MAX_GAP_BYTES)).all())

    def _read_block(
        self, into: Bytes, rows: NDArray[np.int64], offsets: NDArray[np.int64], span: int
    ) -> None:
        """Read everything from the first to the last row at once: many small reads cost more."""
        block = _own_block(span)
        self.source.fill(block, int(offsets[0]))
        shape = (int(rows[-1] - rows[0]) + 1, self._width_bytes)
        strides = (self.stride[0] * self._item_bytes, 1)
        values: Bytes = np.ndarray(shape, np.uint8, block.data, strides=strides)
        into[:] = values if len(values) == len(rows) else values[rows - rows[0]]

    def _read_pieces(self, into: Bytes, offsets: NDArray[np.int64]) -> None:
        """Read each run of rows into its destination, along with narrow gaps between them."""
        if into.flags.c_contiguous:
            # Adjacent rows are one piece.
            firsts = np.append(0, np.flatnonzero(np.diff(offsets) != self._width_bytes) + 1)
        else:
            firsts = np.arange(len(offsets))
        ends = np.append(firsts[1:], len(offsets))
        begins = offsets[firsts]
        gaps = begins[1:] - (offsets[ends[:-1] - 1] + self._width_bytes)
        cuts = np.flatnonzero((gaps < 0) | (gaps > MAX_GAP_BYTES)) + 1
        # Gaps are read into a scratch buffer; empty pieces are skipped.
        parts = np.zeros((2 * len(firsts) - 1, 2), np.int64)
        parts[::2, 0] = into.ctypes.data + firsts * into.strides[0]
        parts[::2, 1] = (ends - firsts) * self._width_bytes
        parts[1::2, 0] = _own_block(MAX_GAP_BYTES).ctypes.data
        parts[1::2, 1] = gaps
        for first, end in pairwise([0, *cuts.tolist(), len(firsts)]):
            wanted = parts[2 * first : 2 * end - 1]
            self.source.scatter(wanted[wanted[:, 1] > 0], int(begins[first]))

    @property
    def _num_spread_bytes(self) -> int:
        span = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (span + 1) * self._item_bytes

    @cached_property
    def _whole(self) -> NDArray[Any]:
        """Return all values, as unsigned integers of their size."""
        data = np.empty(self._num_spread_bytes, np.uint8)
        self.source.fill(data, self.start)
        strides = [step * self._item_bytes for step in self.stride]
        return np.ndarray(self.shape, f"u{self._item_bytes}", data.data, strides=strides)


def find_rows(rows: "slice | Tensor", num_rows: int) -> NDArray[np.int64]:
    """Return the row indices selected by an index."""
    if isinstance(rows, slice):
        return np.arange(num_rows)[rows]
    indices: NDArray[np.int64] = rows.numpy()
    return np.flatnonzero(indices) if indices.dtype == np.bool_ else indices


def _own_block(num_bytes: int) -> Bytes:
    """Return this thread's reusable buffer: allocating memory costs more than the copy."""
    block: Bytes | None = getattr(_local, "block", None)
    if block is None or len(block) < num_bytes:
        block = _local.block = np.empty(num_bytes, np.uint8)
    return block[:num_bytes]
