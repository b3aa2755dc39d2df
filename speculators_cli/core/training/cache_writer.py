"""CacheWriter: keeps computed hidden states on disk, while the next ones are computed."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.data.verifier_input import CacheSlot, VerifierInput
from speculators_cli.core.engines.engine import CapturedStates
from speculators_cli.core.engines.host_states import HostStates, Storage
from speculators_cli.core.files import disk_errors

NUM_THREADS = 4
MAX_IN_FLIGHT = 3  # packed sequences that are copied or written


class CacheWriter:
    """Writes samples in threads.

    Args:
        storage: How hidden states are stored.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._pool = ThreadPoolExecutor(NUM_THREADS, "cache")
        self._in_flight: deque[list[Future[None]]] = deque()

    def add(self, given: VerifierInput, states: CapturedStates) -> None:
        """Write the documents that have a slot; others are not kept.

        Args:
            given: The documents.
            states: Of all of them, before they are rounded.

        Raises:
            MachineError: Earlier ones could not be written.
        """
        wanted = [slot for slot in given.slots if slot is not None]
        if not wanted:
            return
        kept = _pick(given, states)
        copied = HostStates(kept, self.storage)
        bounds = [0, *accumulate(len(slot.input_ids) for slot in wanted)]
        last_bounds = [0, *accumulate(int(slot.loss_mask.sum()) for slot in wanted)]
        spans = zip(wanted, pairwise(bounds), pairwise(last_bounds), strict=True)
        self._in_flight.append(
            [
                self._pool.submit(_write, slot, copied, slice(*aux), slice(*last))
                for slot, aux, last in spans
            ]
        )
        while len(self._in_flight) > MAX_IN_FLIGHT:
            self._wait()

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            MachineError: It could not be.
        """
        try:
            while self._in_flight:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        for future in self._in_flight.popleft():
            future.result()


def _pick(given: VerifierInput, states: CapturedStates) -> CapturedStates:
    """Copy the rows of documents that have a slot, with rows of zeros for tokens of no position."""
    aux: list[Tensor] = []
    last: list[Tensor] = []
    parts = zip(
        given.slots,
        states.aux.split([*given.num_positions, len(states.aux) - sum(given.num_positions)]),
        states.last.split(list(given.num_targets)),
        strict=False,
    )
    for slot, own_aux, own_last in parts:
        if slot is not None:
            unread = own_aux.new_zeros(len(slot.input_ids) - len(own_aux), own_aux.shape[1])
            aux += (own_aux, unread)
            last.append(own_last)
    # A copy, also of a single document: noise is added to the original in place.
    return CapturedStates(torch.cat(aux), torch.cat([*last, last[0][:0]]))


def _write(slot: CacheSlot, copied: HostStates, aux: slice, last: slice) -> None:
    """Write one sample, unless its states are not finite."""
    copied.wait()
    if not copied.is_finite(aux, last):
        return
    sample = Sample(
        input_ids=slot.input_ids,
        loss_mask=slot.loss_mask,
        aux_hidden_states=copied.aux(aux),
        last_hidden_states=SupervisedRows(copied.last(last), slot.loss_mask),
        is_normed=False,
    )
    with disk_errors(slot.file.parent):
        slot.file.parent.mkdir(parents=True, exist_ok=True)
    v1.write_sample(sample, slot.file)
