"""AheadCapturer: hidden states that are requested before the step that needs them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.engines.captured_layers import CapturedLayers, OtherTokensError
from speculators_cli.core.engines.document_stream import DocumentStream
from speculators_cli.core.engines.engine import CapturedStates, Packed, aux_rows_of
from speculators_cli.core.errors import DataError, MachineError, SpeculatorsError
from speculators_cli.core.reading import UnreadableError

NUM_READERS = 2  # packed sequences whose files are read at the same time


class Ticket:
    """A packed sequence whose states are on their way."""

    def __init__(
        self, documents: Sequence["_Document"], states: "Future[CapturedStates]", stream: object
    ) -> None:
        self._documents = documents
        self._states = states
        self._stream = stream

    def wait(self) -> CapturedStates:
        """Return the states, on the device.

        Raises:
            MachineError: vLLM has failed; the sample is named.
            DataError: vLLM refuses a sample, which is named.
        """
        states = self._states.result()
        if isinstance(self._stream, torch.cuda.Stream):
            current = torch.cuda.current_stream(states.aux.device)
            current.wait_stream(self._stream)
            for tensor in (states.aux, states.last):
                tensor.record_stream(current)
        return states

    def cancel(self) -> None:
        """Say that nobody waits for the states; their files are removed."""
        if not self._states.cancel():
            return  # they are being read, which removes the files
        for document in self._documents:
            if not document.file.cancel():
                document.file.add_done_callback(_remove)


def _remove(file: "Future[Path]") -> None:
    if file.exception() is None:
        file.result().unlink(missing_ok=True)


class _Document:
    """A document that was requested, and the rows of the packed sequence that are its own."""

    def __init__(
        self, name: str, start: int, ids: Sequence[int], aux: slice, last: slice,
        file: "Future[Path]",
    ) -> None:  # fmt: skip
        self.name = name
        self.start = start
        self.ids = ids
        self.aux = aux
        self.last = last
        self.file = file


class AheadCapturer:
    """A capturer whose states come from a stream of documents.

    Args:
        stream: Computes them, in the order of the requests.
        layers: Whose states it writes.
        fingerprint: Of what computes them.
        dtype: Of the states.
        hidden_size: Width of the states of a layer.
        device: Where they are needed.
    """

    def __init__(
        self,
        stream: DocumentStream,
        layers: CapturedLayers,
        *,
        fingerprint: Mapping[str, str],
        dtype: torch.dtype,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.layer_ids = tuple(sorted(set(layers.layer_ids)))
        self._stream = stream
        self._layers = layers
        self._fingerprint = fingerprint
        self._hidden_size = hidden_size
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(NUM_READERS, "states")

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Versions of vLLM, torch and transformers, dtype and flags."""
        return self._fingerprint

    def request(self, packed: Packed, names: Sequence[str] = ()) -> Ticket:
        """Request the states of packed documents, which are on the CPU.

        Args:
            packed: Those without wanted rows, such as padding, are left out.
            names: Of the documents, for messages.
        """
        bounds = torch.tensor([0, *accumulate(packed.lengths)])
        aux_rows = aux_rows_of(packed)
        spans = zip(
            pairwise(bounds.tolist()),
            pairwise(torch.searchsorted(aux_rows, bounds).tolist()),
            pairwise(torch.searchsorted(packed.rows, bounds).tolist()),
            strict=True,
        )
        documents = []
        for index, ((start, end), aux, last) in enumerate(spans):
            if aux[0] == aux[1] and last[0] == last[1]:
                continue
            ids = packed.input_ids[start:end].tolist()
            name = names[index] if index < len(names) else f"document {index}"
            file = self._stream.submit(ids)
            documents.append(_Document(name, start, ids, slice(*aux), slice(*last), file))
        states = self._pool.submit(self._assemble, packed, aux_rows, documents)
        return Ticket(documents, states, self._copies)

    def capture(self, packed: Packed) -> CapturedStates:
        """Compute the hidden states of packed documents, none of which sees another.

        Raises:
            MachineError: vLLM has failed; the document is named.
            DataError: vLLM refuses a document.
        """
        return self.request(packed).wait()

    def close(self) -> None:
        """End the stream."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stream.close()

    def _assemble(
        self, packed: Packed, aux_rows: Tensor, documents: Sequence[_Document]
    ) -> CapturedStates:
        """Read the files of documents, one after the other, and copy their rows to the device."""
        aux = self._make(
            len(aux_rows) + packed.num_zero_rows, len(self.layer_ids) * self._hidden_size
        )
        last = self._make(len(packed.rows), self._hidden_size)
        aux[len(aux_rows) :] = 0
        for document in documents:
            states = self._read(document)
            own = states[aux_rows[document.aux] - document.start]
            aux[document.aux] = own[:, self._layers.aux_columns].flatten(1)
            last[document.last] = states[packed.rows[document.last] - document.start, -1]
        if self._copies is None:
            return CapturedStates(aux, last)
        with torch.cuda.stream(self._copies):
            return CapturedStates(
                aux.to(self._device, non_blocking=True), last.to(self._device, non_blocking=True)
            )

    def _make(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, pin_memory=self._copies is not None)

    def _read(self, document: _Document) -> Tensor:
        try:
            try:
                return self._layers.read(document.file.result(), document.ids)
            except UnreadableError:  # it went with a process that has died
                file = self._stream.submit(document.ids).result()
                return self._layers.read(file, document.ids)
        except (OtherTokensError, UnreadableError) as error:
            raise MachineError(
                f"The hidden states of {document.name} cannot be used: {error}",
                hint="Rerun the same command, and report it if it happens again",
            ) from None
        except SpeculatorsError as error:
            kind = DataError if isinstance(error, DataError) else MachineError
            raise kind(
                f"The hidden states of {document.name} are missing: {error.message}",
                hint=error.hint,
            ) from None
