"""Batches without hidden states, with the verifier's input from which these are computed."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.verifier_input import padded_length, plan_input


def collate_live(
    sample_ids: Sequence[int],
    samples: Sequence[Sample],
    *,
    total_seq_len: int,
    alignment: Alignment,
    pin_memory: bool,
    pads: bool,
) -> Batch:
    """Pack samples, whose hidden states have a width of 0.

    Args:
        sample_ids: Of the samples.
        samples: Ids and masks.
        total_seq_len: Positions; those beyond it are truncated.
        alignment: Which tokens are positions.
        pin_memory: Whether the tensors are in pinned memory.
        pads: Whether the verifier's input is padded to a usual length.
    """
    batch = collate(
        sample_ids,
        samples,
        total_seq_len=total_seq_len,
        num_aux_layers=0,
        hidden_size=0,
        dtype=torch.bfloat16,  # of no effect
        alignment=alignment,
        pin_memory=pin_memory,
    )
    needed = [
        sample.input_ids[: length + alignment.shift] if length else sample.input_ids[:0]
        for sample, length in zip(samples, batch.lengths, strict=True)
    ]
    given = plan_input(
        needed,
        batch.targets,
        shift=alignment.shift,
        padded_to=padded_length(total_seq_len) if pads else None,
    )
    if pin_memory:
        given = given.map(torch.Tensor.pin_memory)
    return replace(batch, verifier_input=given)


def without_states(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> Sample:
    """A sample whose hidden states have a width of 0."""
    return Sample(
        input_ids=input_ids,
        loss_mask=loss_mask,
        aux_hidden_states=(),
        last_hidden_states=torch.empty(len(input_ids), 0),
        is_normed=False,
    )
