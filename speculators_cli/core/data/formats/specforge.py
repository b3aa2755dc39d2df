"""SpecForge's `.ckpt`: aux hidden states in one matrix, last hidden states after the final norm."""

from collections.abc import Mapping

import torch

from speculators_cli.core.data.formats.format import (
    Layout,
    SampleFormat,
    get_tensor,
    own_memory,
    split_columns,
)
from speculators_cli.core.data.sample import BadSampleError, Sample


def lay_out(content: Mapping[object, object]) -> Layout:
    """Find the parts: `aux_hidden_state` [seq_len, aux*hidden], `hidden_state` [seq_len, hidden].

    `hidden_state` are the last hidden states here, and the aux ones in v0.

    Raises:
        BadSampleError: The file holds something else.
    """
    if "aux_hidden_state" not in content:
        if "target" in content and "hidden_state" in content:
            raise BadSampleError("is a v0 sample, read as SpecForge's", other_format="v0")
        if "hidden_states" in content:
            raise BadSampleError("is a v1 sample, read as SpecForge's", other_format="v1")
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    last = get_tensor(content, "hidden_state")
    layers = split_columns(content, "aux_hidden_state", last, "hidden_state")
    return Layout(input_ids, loss_mask, (*layers, last), is_normed=True)


def arrange(sample: Sample) -> dict[str, object]:
    """Name the parts of a sample, whose last hidden states must be normed."""
    assert sample.is_normed, "SpecForge holds last hidden states after the final norm"
    return {
        "input_ids": own_memory(sample.input_ids),
        "loss_mask": own_memory(sample.loss_mask),
        "aux_hidden_state": torch.cat(sample.aux_hidden_states, dim=-1)[None],
        "hidden_state": own_memory(sample.last_hidden_states)[None],
    }


FORMAT = SampleFormat("specforge", (".ckpt",), lay_out, arrange)
