"""Where the hidden states of a batch come from: its files, or the verifier, run in the step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.engines.ahead_capturer import Ticket
from speculators_cli.core.engines.engine import CapturedStates, Capturer, Packed
from speculators_cli.core.engines.host_states import round_states
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import format_bytes
from speculators_cli.core.training.cache_writer import CacheWriter


class StateFiller(Protocol):
    """Gives batches their hidden states."""

    def fill(self, batch: Batch) -> Batch:
        """Return the batch with hidden states, on its device."""

    def take_seconds(self) -> float | None:
        """Seconds of computing hidden states since the last call; None if they are all stored."""

    def close(self) -> None:
        """Wait until states that are kept are written."""


class StoredStates:
    """Leaves batches as they were read."""

    def fill(self, batch: Batch) -> Batch:
        """Return the batch, whose hidden states were read with it."""
        return batch

    def take_seconds(self) -> float | None:
        """Return None."""
        return None

    def close(self) -> None:
        """Do nothing."""


class LiveStates:
    """Computes hidden states with the verifier, on the device and in the stream of the step.

    Those that were requested ahead are only waited for.

    Args:
        engine: Computes them.
        weights_bytes: Size of its weights on this device, for messages.
        writer: Keeps states of some samples, to whose precision all are rounded.
        join: Called for a batch that has its states, where other ranks compute theirs with weights
            that all of them share.
    """

    def __init__(
        self,
        engine: Capturer,
        *,
        weights_bytes: int,
        writer: CacheWriter | None = None,
        join: Callable[[], None] | None = None,
    ) -> None:
        self.join = join
        self.writer = writer
        self.engine = engine
        self.weights_bytes = weights_bytes
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def fill(self, batch: Batch) -> Batch:
        """Compute the hidden states of a batch that has none.

        Raises:
            MachineError: The device has too little memory, or the engine has failed.
            DataError: The engine refuses a sample.
        """
        if batch.verifier_input is None:
            if self.join is not None:
                self.join()
            return batch
        ticket = batch.verifier_input.ticket
        with self._timed(batch.input_ids.device):
            states = ticket.wait() if isinstance(ticket, Ticket) else self._capture(batch)
            if self.writer is not None:
                self.writer.add(batch.verifier_input, states)
                states = round_states(states, self.writer.storage)
            return _with_states(batch, states)

    def take_seconds(self) -> float | None:
        """Return the seconds of capture since the last call; waits for the last one."""
        spans, self._spans = self._spans, []
        if spans:
            spans[-1][1].synchronize()
        seconds: float = self._seconds + sum(a.elapsed_time(b) for a, b in spans) / 1e3
        self._seconds = 0.0
        return seconds

    def close(self) -> None:
        """Wait until states that are kept are written.

        Raises:
            MachineError: They could not be.
        """
        if self.writer is not None:
            self.writer.close()

    def _capture(self, batch: Batch) -> CapturedStates:
        packed = packed_of(batch)
        try:
            return self.engine.capture(packed)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"The GPU is out of memory in the capture of {len(packed.input_ids):,} tokens: the "
                f"verifier's weights take {format_bytes(self.weights_bytes)} of "
                f"{format_bytes(torch.cuda.memory_allocated())} in use",
                hint="Lower `--total-seq-len`, or shard the verifier across GPUs with "
                "`--shard-verifier`",
            ) from None

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            began_at = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began_at
            return
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
        yield
        events[1].record()
        self._spans.append(events)


def _with_states(batch: Batch, states: CapturedStates) -> Batch:
    given = batch.verifier_input
    aux, last = states.aux, states.last
    if given is not None and given.places is not None:
        places, batch = given.places, batch.scale()
        aux = batch.aux_hidden_states.index_copy_(0, places.positions, aux)
        last = batch.last_hidden_states.index_copy_(0, places.targets, last)
    return replace(batch, aux_hidden_states=aux, last_hidden_states=last, verifier_input=None)


def packed_of(batch: Batch) -> Packed:
    """Return what the verifier computes for a batch."""
    given = batch.verifier_input
    assert given is not None, "its states are to be computed"
    num_zero_rows = len(batch.input_ids) - len(given.aux_rows)
    return Packed(
        input_ids=given.input_ids,
        lengths=given.lengths,
        rows=given.last_rows,
        aux_rows=given.aux_rows,
        position_ids=given.position_ids,
        num_zero_rows=num_zero_rows if given.places is None else 0,
    )
