"""Captured hidden states on their way to the host, in the precision that they are stored in."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speculators_cli.core.data.float8 import ScaledStates, quantize_rows
from speculators_cli.core.data.sample import States
from speculators_cli.core.engines.engine import CapturedStates


@dataclass(frozen=True)
class Storage:
    """How hidden states are stored."""

    dtype: Literal["bfloat16", "float8"] | None  # None: that of the verifier
    has_all_last_states: bool

    @property
    def is_float8(self) -> bool:
        """Whether they are quantized."""
        return self.dtype == "float8"

    def item_bytes(self, own: torch.dtype) -> int:
        """Return the size of a value, for states of dtype `own`."""
        sizes = {"float8": 1, "bfloat16": 2, None: own.itemsize}
        return sizes[self.dtype]


ROWS_AT_ONCE = 4096  # quantized, in float32


def round_states(states: CapturedStates, storage: Storage) -> CapturedStates:
    """Round hidden states to what is read back after they are stored, in their own dtype.

    With float8, values are those of `ScaledStates`: the product with the scale, in bfloat16.
    """
    if storage.dtype is None:
        return states
    return CapturedStates(
        *(_round(x, states.last.shape[1], storage) for x in (states.aux, states.last))
    )


def _round(values: Tensor, hidden_size: int, storage: Storage) -> Tensor:
    if not storage.is_float8:
        return values.bfloat16().to(values.dtype)
    rounded = torch.empty_like(values)
    flat, into = values.view(-1, hidden_size), rounded.view(-1, hidden_size)
    for some, place in zip(flat.split(ROWS_AT_ONCE), into.split(ROWS_AT_ONCE), strict=True):
        codes, scales = quantize_rows(some)
        place.copy_((codes.float() * scales[:, None]).bfloat16())
    return rounded


class HostStates:
    """States of a packed sequence on their way to the host; quantized on the device.

    Args:
        states: On the engine's device, or the CPU.
        storage: How they are stored.
    """

    def __init__(self, states: CapturedStates, storage: Storage) -> None:
        self._hidden_size = states.last.shape[1]
        self._num_layers = states.aux.shape[1] // self._hidden_size
        parts = {
            "aux": states.aux,
            "last": states.last,
            "is_finite": states.aux.isfinite().all(-1),
            "is_last_finite": states.last.isfinite().all(-1),
        }
        if storage.dtype == "bfloat16":
            parts |= {"aux": states.aux.bfloat16(), "last": states.last.bfloat16()}
        if storage.is_float8:
            values, scales = quantize_rows(states.aux.view(-1, self._hidden_size))
            parts["aux"] = values.view(len(states.aux), -1)
            parts["aux_scales"] = scales.view(len(states.aux), -1)
            parts["last"], parts["last_scales"] = quantize_rows(states.last)
        self._event: torch.cuda.Event | None = None
        self._parts = self._copy(parts) if states.aux.is_cuda else parts

    def _copy(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy on a stream of its own, behind the computation and beside the next one."""
        stream = _copy_stream(parts["aux"].device)
        stream.wait_stream(torch.cuda.current_stream(parts["aux"].device))
        with torch.cuda.stream(stream):
            copied = {}
            for name, part in parts.items():
                copied[name] = torch.empty_like(part, device="cpu", pin_memory=True)
                copied[name].copy_(part, non_blocking=True)
                part.record_stream(stream)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        return copied

    def wait(self) -> None:
        """Wait for the copy."""
        if self._event is not None:
            self._event.synchronize()

    def is_finite(self, tokens: slice, last: slice) -> bool:
        """Whether all states of a document are finite."""
        aux, own_last = self._parts["is_finite"][tokens], self._parts["is_last_finite"][last]
        return bool(aux.all() and own_last.all())

    def aux(self, tokens: slice) -> tuple[States, ...]:
        """Return the aux hidden states of a document, a layer each."""
        return tuple(self._states("aux", tokens, layer, layer) for layer in range(self._num_layers))

    def last(self, rows: slice) -> States:
        """Return the last hidden states of a document."""
        return self._states("last", rows, 0, 0)

    def _states(self, name: str, rows: slice, layer: int, column: int) -> States:
        start = layer * self._hidden_size
        values = self._parts[name][rows, start : start + self._hidden_size]
        scales = self._parts.get(f"{name}_scales")
        if scales is None:
            return values
        own = scales[rows].reshape(len(values), -1)[:, column, None]
        return ScaledStates(values, own)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
