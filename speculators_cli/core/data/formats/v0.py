"""Format v0: aux hidden states in one matrix, last hidden states after the final norm."""

from collections.abc import Mapping

import torch

from speculators_cli.core.data.formats.format import (
    Layout,
    SampleFormat,
    get_tensor,
    own_memory,
    refuse_foreign,
    split_columns,
)
from speculators_cli.core.data.sample import BadSampleError, Sample


def lay_out(content: Mapping[object, object]) -> Layout:
    """Find the parts: `hidden_state` [seq_len, aux*hidden] and `target` [seq_len, hidden].

    Raises:
        BadSampleError: The file holds something else.
    """
    refuse_foreign(content)
    if "hidden_states" in content and "target" not in content:
        raise BadSampleError("is a v1 sample, read as v0", other_format="v1")
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    last = get_tensor(content, "target")
    layers = split_columns(content, "hidden_state", last, "target")
    return Layout(input_ids, loss_mask, (*layers, last), is_normed=True)


def arrange(sample: Sample) -> dict[str, object]:
    """Name the parts of a sample, whose last hidden states must be normed."""
    assert sample.is_normed, "v0 holds last hidden states after the final norm"
    return {
        "input_ids": own_memory(sample.input_ids),
        "loss_mask": own_memory(sample.loss_mask),
        "hidden_state": torch.cat(sample.aux_hidden_states, dim=-1),
        "target": own_memory(sample.last_hidden_states),
    }


FORMAT = SampleFormat("v0", (".pt", ".ckpt"), lay_out, arrange)
