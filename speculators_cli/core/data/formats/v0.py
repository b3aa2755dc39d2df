"""Format v0: aux hidden states in one matrix, last hidden states after the final norm."""

from collections.abc import Mapping

import torch

from speculators_cli.core.data.formats.format import (
    Layout,
    SampleFormat,
    get_tensor,
    own_memory,
    refuse_foreign,
)
from speculators_cli.core.data.sample import BadSampleError, Sample


def lay_out(content: Mapping[object, object]) -> Layout:
    """Find the parts: `hidden_state` [seq_len, aux*hidden] and `target` [seq_len, hidden].

    Raises:
        BadSampleError: The file holds something else.
    """
    refuse_foreign(content)
    if "hidden_states" in content and "target" not in content:
        raise BadSampleError("is a v1 sample, read as v0", other_version=1)
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    aux, last = get_tensor(content, "hidden_state"), get_tensor(content, "target")
    if len(aux.shape) != 2 or len(last.shape) != 2:
        raise BadSampleError(
            f"has `hidden_state` of shape {list(aux.shape)} and `target` of shape "
            f"{list(last.shape)}, expected [seq_len, aux*hidden] and [seq_len, hidden]"
        )
    width, hidden_size = aux.shape[1], last.shape[1]
    if hidden_size == 0 or width == 0 or width % hidden_size:
        raise BadSampleError(
            f"has `hidden_state` {width:,} wide, not a multiple of the {hidden_size:,} of `target`"
        )
    layers = [aux.columns(start, start + hidden_size) for start in range(0, width, hidden_size)]
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


FORMAT = SampleFormat(0, lay_out, arrange)
