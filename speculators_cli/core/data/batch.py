"""Batch: the tensors of one packed sequence."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from speculators_cli.core.data.alignment import NEXT_TOKEN, Alignment
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.states_buffer import Float8Rows, StatesBuffer
from speculators_cli.core.data.verifier_input import VerifierInput


@dataclass(frozen=True)
class Float8States:
    """Hidden states of the documents of a batch that are stored as float8."""

    aux: Float8Rows
    last: Float8Rows

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor."""
        return type(self)(self.aux.map(change), self.last.map(change))


@dataclass(frozen=True)
class Batch:
    """One packed sequence of `seq_len` tokens, padded at its end.

    The algorithm's `Alignment` decides which rows of a sample a position consists of. Padding has
    document id -1, loss mask False and zeros elsewhere.

    Last hidden states are included for supervised positions only, the targets. A batch with
    `verifier_input` has no hidden states yet, and one with `float8` only has those of other
    documents: without any, theirs have a width of 0.
    """

    input_ids: Tensor  # [seq_len], int64
    aux_hidden_states: Tensor  # [seq_len, aux*hidden], float
    loss_mask: Tensor  # [seq_len], bool
    document_ids: Tensor  # [seq_len], int64: from 0 in order, -1 is padding
    position_ids: Tensor  # [seq_len], int64: from 1 in each document, 0 is padding
    targets: Tensor  # positions where the loss mask is True on the host
    last_hidden_states: Tensor  # [targets, hidden], float
    is_normed: Tensor  # [targets], bool: last hidden states are after the final norm
    host_mask: Tensor  # [seq_len], bool: the loss mask as read, always on the CPU
    lengths: tuple[int, ...]  # tokens of each document, in order
    sample_ids: tuple[int, ...]  # the sample of each document: its index in the dataset
    verifier_input: VerifierInput | None = None  # hidden states are still to be computed
    float8: Float8States | None = None  # hidden states are still to be scaled
    anchors: Tensor | None = None  # [anchors], int64, ascending: drawn positions, on the CPU
    depths: Tensor | None = None  # [seq_len], int64: drawn numbers of predictions, on the CPU

    def to(self, device: torch.device) -> Self:
        """Copy to a device, except for the host mask; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the hidden states to another dtype, after those in float8 are scaled."""
        scaled = self.scale()
        return replace(
            scaled,
            aux_hidden_states=scaled.aux_hidden_states.to(dtype),
            last_hidden_states=scaled.last_hidden_states.to(dtype),
        )

    def scale(self) -> Self:
        """Write hidden states that are in float8 as floats, on the device of the batch."""
        if self.float8 is None:
            return self
        return replace(
            self,
            aux_hidden_states=self.float8.aux.write_into(self.aux_hidden_states),
            last_hidden_states=self.float8.last.write_into(self.last_hidden_states),
            float8=None,
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Record the use of the tensors on `stream`, so that their memory is not reused early."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor on the device."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            aux_hidden_states=change(self.aux_hidden_states),
            loss_mask=change(self.loss_mask),
            document_ids=change(self.document_ids),
            position_ids=change(self.position_ids),
            targets=change(self.targets),
            last_hidden_states=change(self.last_hidden_states),
            is_normed=change(self.is_normed),
            verifier_input=None if self.verifier_input is None else self.verifier_input.map(change),
            float8=None if self.float8 is None else self.float8.map(change),
        )

    def at_positions(
        self,
        values: Tensor,  # [targets, ...]
    ) -> Tensor:
        """Scatter values of targets to their positions, zeros elsewhere; [seq_len, ...]."""
        empty = values.new_zeros(len(self.input_ids), *values.shape[1:])
        return empty.index_copy_(0, self.targets, values)


def collate(
    sample_ids: Sequence[int],
    samples: Iterable[Sample],
    *,
    total_seq_len: int,
    num_aux_layers: int,
    hidden_size: int,
    dtype: torch.dtype,
    alignment: Alignment = NEXT_TOKEN,
    pin_memory: bool = False,
) -> Batch:
    """Pack samples end to end; each hidden state is read once, from its file into the batch.

    Those in float8 stay in float8, to be scaled on the device.

    `alignment` decides which rows of a sample are positions. Positions beyond `total_seq_len` are
    truncated. Last hidden states are read at supervised positions only. Samples are read one at a
    time.

    Raises:
        ChangedSampleError: The file of a sample has changed.
    """

    def make(*shape: int, of: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=of, pin_memory=pin_memory)

    input_ids, position_ids, targets = (make(total_seq_len, of=torch.int64) for _ in range(3))
    document_ids = make(total_seq_len, of=torch.int64).fill_(-1)
    loss_mask, is_normed = (make(total_seq_len, of=torch.bool) for _ in range(2))
    aux = StatesBuffer(
        total_seq_len, num_aux_layers, hidden_size, dtype=dtype, pin_memory=pin_memory
    )
    last = StatesBuffer(total_seq_len, 1, hidden_size, dtype=dtype, pin_memory=pin_memory)
    start, num_targets, lengths = 0, 0, []
    for document, sample in enumerate(samples):
        length = min(alignment.count_positions(sample.num_tokens), total_seq_len - start)
        here = slice(start, start + length)
        tokens = alignment.tokens(length)
        input_ids[here] = sample.input_ids[tokens]
        loss_mask[here] = sample.loss_mask[tokens]
        position_ids[here] = torch.arange(1, 1 + length)
        document_ids[here] = document
        supervised = loss_mask[here].nonzero().flatten()
        own = slice(num_targets, num_targets + len(supervised))
        targets[own] = supervised + start
        is_normed[own] = sample.is_normed
        if sample.aux_hidden_states:  # else they are computed later
            aux.read(sample.aux_hidden_states, slice(0, length), start)
            last.read((sample.last_hidden_states,), supervised + tokens.start, num_targets)
        lengths.append(length)
        start += length
        num_targets += len(supervised)
    aux_states, aux_float8 = aux.finish(total_seq_len, start)
    last_states, last_float8 = last.finish(num_targets, num_targets)
    return Batch(
        input_ids=input_ids,
        aux_hidden_states=aux_states,
        loss_mask=loss_mask,
        document_ids=document_ids,
        position_ids=position_ids,
        targets=targets[:num_targets],
        last_hidden_states=last_states,
        is_normed=is_normed[:num_targets],
        host_mask=loss_mask,
        lengths=tuple(lengths),
        sample_ids=tuple(sample_ids),
        float8=Float8States(aux_float8, last_float8) if aux_float8 and last_float8 else None,
    )


def drop_non_finite(batch: Batch) -> tuple[Batch, Tensor]:
    """Exclude documents with NaN or Inf in their hidden states from the loss, in place.

    Returns:
        The batch, with the states of such documents zeroed and unsupervised; a mask of these
        documents, [documents], bool, on the batch's device.
    """
    # A sum is finite only if all its parts are; an overflow of float32 is treated the same.
    sums = batch.aux_hidden_states.sum(-1, dtype=torch.float32)
    sums = sums + batch.at_positions(batch.last_hidden_states.sum(-1, dtype=torch.float32))
    is_bad = ~sums.isfinite() & (batch.document_ids >= 0)
    # One more element, for padding.
    bad_counts = torch.zeros(len(batch.lengths) + 1, dtype=torch.int64, device=is_bad.device)
    bad_counts.index_add_(0, batch.document_ids + 1, is_bad.long())
    is_broken = bad_counts[1:] > 0
    rows = rows_of(is_broken, batch)
    kept = replace(
        batch,
        aux_hidden_states=batch.aux_hidden_states.masked_fill(rows[:, None], 0.0),
        last_hidden_states=batch.last_hidden_states.masked_fill(rows[batch.targets, None], 0.0),
        loss_mask=batch.loss_mask & ~rows,
    )
    return kept, is_broken


def rows_of(
    documents: Tensor,  # [documents], bool
    batch: Batch,
) -> Tensor:
    """Return a mask of the rows of these documents; [seq_len], bool."""
    return torch.cat([documents.new_zeros(1), documents])[batch.document_ids + 1]
