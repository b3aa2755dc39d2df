"""Weights that are still on their way from other ranks: read only after a wait on the device."""

from collections.abc import Iterable

import torch
from torch import Tensor


def expect_arrival(weights: Iterable[Tensor]) -> None:
    """Note that the current stream writes these weights."""
    for weight in weights:
        if weight.is_cuda:
            event = torch.cuda.current_stream().record_event()
            weight.arrival = event  # type: ignore[attr-defined]


def wait_for_arrival(weights: Iterable[Tensor]) -> None:
    """Let the current stream wait for what still writes these weights, or those they view."""
    for weight in weights:
        viewed = weight._base  # noqa: SLF001
        event = getattr(weight if viewed is None else viewed, "arrival", None)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
