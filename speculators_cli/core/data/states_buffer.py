"""Hidden states of a packed sequence while it is read: as floats, or as float8 with scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.data.float8 import SCALED_AT_ONCE, ScaledStates, scale_rows
from speculators_cli.core.data.sample import States
from speculators_cli.core.data.stored import StoredStates, find_rows
from speculators_cli.core.data.supervised_rows import SupervisedRows

CAST_AT_ONCE = 1024  # rows
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Float8Rows:
    """Float8 hidden states of some rows of a packed sequence, not scaled yet."""

    codes: Tensor  # [rows, layers, hidden], float8_e4m3fn
    scales: Tensor  # [rows, layers, 1], float32
    places: Tensor  # [rows], int64: rows of the sequence

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor."""
        return type(self)(change(self.codes), change(self.scales), change(self.places))

    def write_into(
        self,
        states: Tensor,  # [seq_len, layers*hidden], any float dtype; of width 0: none yet
    ) -> Tensor:
        """Scale the rows on their device and write them to their places.

        Returns:
            `states`; in place of a width of 0, with zeros in all other rows.
        """
        if not states.shape[1]:
            states = states.new_zeros(len(states), self.codes[:1].numel())
        at_once = max(SCALED_AT_ONCE // max(states.shape[1], 1), 1)
        parts = (x.split(at_once) for x in (self.codes, self.scales, self.places))
        for codes, scales, places in zip(*parts, strict=True):
            scaled = scale_rows(codes, scales).flatten(1)
            states.index_copy_(0, places, scaled.to(states.dtype))
        return states


class StatesBuffer:
    """Receives the hidden states of one document after the other.

    Memory for floats and for float8 is allocated with the first document that has them.

    Args:
        num_rows: Capacity.
        num_layers: Layers of a row.
        hidden_size: Values of a layer.
        dtype: Of floats, to which those of documents are cast.
        pin_memory: Whether the memory is pinned.
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        pin_memory: bool,
    ) -> None:
        self._num_rows = num_rows
        self._layers = (num_layers, hidden_size)
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._floats: Tensor | None = None
        self._float8: Float8Rows | None = None
        self._num_float8 = 0

    def read(
        self,
        layers: Sequence[States],
        rows: slice | Tensor,  # of the document: a slice, or [rows], int64, ascending
        start: int,
    ) -> None:
        """Read rows of the layers of a document into the rows from `start` on."""
        held = [_locate(states, rows) for states in layers]
        if any(isinstance(states, ScaledStates) for states, _ in held):
            self._read_float8(held, start)
            return
        if self._floats is None:
            # Not initialized where documents follow: filling first would write every byte twice.
            self._floats = self._make(self._layers[0] * self._layers[1], of=self._dtype)
        column = 0
        for states, own in side_by_side(held):
            columns = slice(column, column + states.shape[1])
            copy_rows(states, own, self._floats[start : start + len(own), columns])
            column = columns.stop

    def finish(self, num_rows: int, num_filled: int) -> tuple[Tensor, Float8Rows | None]:
        """Return the first rows, of which those that are not filled are zeros.

        Returns:
            [rows, layers*hidden]: rows of float8 documents are not written yet; of width 0 if all
            are; and those documents.
        """
        floats = self._floats
        if floats is None:
            width = 0 if self._float8 is not None else self._layers[0] * self._layers[1]
            floats = self._make(width, of=self._dtype)
        floats = floats[:num_rows]
        bits_of(floats)[num_filled:] = 0
        if self._float8 is None:
            return floats, None
        return floats, self._float8.map(lambda x: x[: self._num_float8])

    def _read_float8(self, held: Sequence["_Held"], start: int) -> None:
        if self._float8 is None:
            self._float8 = Float8Rows(
                codes=self._make(*self._layers, of=torch.float8_e4m3fn),
                scales=self._make(self._layers[0], 1, of=torch.float32),
                places=self._make(of=torch.int64),
            )
        into, first = self._float8, self._num_float8
        num_rows = len(held[0][1])
        here = slice(first, first + num_rows)
        codes = into.codes.view(torch.uint8).numpy()
        for layer, (states, rows) in enumerate(held):
            assert isinstance(states, ScaledStates), "layers of a sample are all float8, or none"
            states.read_codes(codes[here, layer], rows)
            into.scales.numpy()[here, layer] = states.scales.numpy()[rows]
        into.places.numpy()[here] = np.arange(start, start + num_rows)
        self._num_float8 = here.stop

    def _make(self, *shape: int, of: torch.dtype) -> Tensor:
        return torch.empty((self._num_rows, *shape), dtype=of, pin_memory=self._pin_memory)


_Held = tuple[States, NDArray[np.int64]]  # rows that exist, and which of them are read


def _locate(states: States, rows: slice | Tensor) -> _Held:
    if isinstance(states, SupervisedRows):
        rows, states = states.locate(rows), states.held
    return states, find_rows(rows, len(states))


def side_by_side(layers: Sequence[_Held]) -> list[_Held]:
    """Merge layers whose rows are adjacent in a file: they are read together."""
    blocks: list[_Held] = []
    for layer, rows in layers:
        before = blocks[-1][0] if blocks else None
        both = None
        if isinstance(before, StoredStates) and isinstance(layer, StoredStates):
            both = before.beside(layer)
        if both is None:
            blocks.append((layer, rows))
        else:
            blocks[-1] = both, rows
    return blocks


def copy_rows(
    states: States,
    rows: NDArray[np.int64],  # [rows], ascending
    into: Tensor,  # [rows, hidden], any float dtype
) -> None:
    """Copy some rows, with a cast if the dtype differs; no other rows of a file are read."""
    bits = bits_of(into)
    if states.dtype != into.dtype:
        wanted = torch.from_numpy(rows)
        for start in range(0, len(wanted), CAST_AT_ONCE):
            part = slice(start, start + CAST_AT_ONCE)
            bits[part] = bits_of(states[wanted[part]].to(into.dtype))
    elif isinstance(states, StoredStates):
        states.read_into(bits.view(np.uint8), rows)
    else:
        # Not `np.take`, which copies a non-contiguous source completely.
        bits[:] = bits_of(states[:])[rows]


def bits_of(tensor: Tensor) -> NDArray[np.generic]:
    """View the tensor's memory in NumPy, whose copies stay on the calling thread.

    torch's own copies would start a thread pool per reader, and slow down training.
    """
    bits: NDArray[np.generic] = tensor.view(INTEGERS[tensor.element_size()]).numpy()
    return bits
