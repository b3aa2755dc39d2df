"""Batches without hidden states, with the verifier's input from which these are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.state_cache import StatesFormat
from speculators_cli.core.data.verifier_input import (
    CacheSlot,
    Places,
    VerifierInput,
    padded_length,
    plan_input,
)

CACHED_STEP = 2048  # tokens: lengths of the verifier's input where some samples are cached


@dataclass(frozen=True)
class LiveSample:
    """A sample of a live batch."""

    sample: Sample  # with hidden states if they are cached, else of a width of 0
    slot: CacheSlot | None = None  # where computed states are kept

    @property
    def is_cached(self) -> bool:
        """Whether its hidden states are there already."""
        return bool(self.sample.aux_hidden_states)


def collate_live(
    sample_ids: Sequence[int],
    samples: Sequence[LiveSample],
    *,
    total_seq_len: int,
    alignment: Alignment,
    pin_memory: bool,
    pads: bool,
    states: StatesFormat | None = None,
) -> Batch:
    """Pack samples; the verifier's input has those that are not cached.

    Args:
        sample_ids: Of the samples.
        samples: Ids and masks, and cached hidden states.
        total_seq_len: Positions; those beyond it are truncated.
        alignment: Which tokens are positions.
        pin_memory: Whether the tensors are in pinned memory.
        pads: Whether the verifier's input is padded to a usual length.
        states: Form of cached hidden states; None if there are none.
    """
    has_cached = states is not None and any(x.is_cached for x in samples)
    batch = collate(
        sample_ids,
        [x.sample for x in samples],
        total_seq_len=total_seq_len,
        num_aux_layers=states.num_aux_layers if states and has_cached else 0,
        hidden_size=states.hidden_size if states and has_cached else 0,
        dtype=states.dtype if states and has_cached else torch.bfloat16,
        alignment=alignment,
        pin_memory=pin_memory,
    )
    if has_cached and all(x.is_cached for x in samples):
        return batch
    given = _plan(batch, samples, total_seq_len, alignment, has_cached=has_cached, pads=pads)
    return replace(
        batch, verifier_input=given.map(torch.Tensor.pin_memory) if pin_memory else given
    )


def _plan(
    batch: Batch,
    samples: Sequence[LiveSample],
    total_seq_len: int,
    alignment: Alignment,
    *,
    has_cached: bool,
    pads: bool,
) -> VerifierInput:
    is_fresh = [not x.is_cached for x in samples]
    documents: list[Tensor] = []
    for x, length, fresh in zip(samples, batch.lengths, is_fresh, strict=True):
        if fresh:
            documents.append(x.sample.input_ids[: length + alignment.shift if length else 0])
    padded_to = padded_length(total_seq_len) if pads else None
    targets, places = batch.targets, None
    if has_cached:
        # One more element, for padding.
        flags = torch.tensor([False, *is_fresh])
        positions = flags[batch.document_ids + 1].nonzero().flatten()
        own = flags[batch.document_ids[targets] + 1].nonzero().flatten()
        places = Places(positions, own)
        targets = torch.searchsorted(positions, targets[own])
        if padded_to is not None:
            # A few lengths more, to compute less: each is another shape to compile.
            num_tokens = sum(map(len, documents))
            padded_to = min(-(-num_tokens // CACHED_STEP) * CACHED_STEP, padded_to)
    given = plan_input(documents, targets, shift=alignment.shift, padded_to=padded_to)
    slots = tuple(x.slot for x in samples if not x.is_cached)
    return replace(
        given,
        sample_ids=tuple(x for x, own in zip(batch.sample_ids, is_fresh, strict=True) if own),
        places=places,
        slots=slots if any(slots) else (),
    )


def without_states(input_ids: Tensor, loss_mask: Tensor) -> Sample:
    """A sample whose hidden states have a width of 0."""
    return Sample(
        input_ids=input_ids,
        loss_mask=loss_mask,
        aux_hidden_states=(),
        last_hidden_states=torch.empty(len(input_ids), 0),
        is_normed=False,
    )
