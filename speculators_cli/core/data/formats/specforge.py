"""SpecForge's `.ckpt`, also gzipped: aux states in one matrix, last states after the norm."""

from collections.abc import Mapping

from speculators_cli.core.data.formats.format import (
    SampleFormat,
    get_tensor,
    split_columns,
)
from speculators_cli.core.data.formats.layout import Layout


def lay_out(content: Mapping[object, object]) -> Layout:
    """Locate them: `aux_hidden_state` [seq_len, aux*hidden], `hidden_state` [seq_len, hidden].

    `hidden_state` has the last hidden states here, and the aux ones in v0.

    Raises:
        BadSampleError: A tensor is missing.
    """
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    last = get_tensor(content, "hidden_state", 2)
    layers = split_columns(content, "aux_hidden_state", last, "hidden_state")
    return Layout(input_ids, loss_mask, (*layers, last), is_normed=True)


FORMAT = SampleFormat(
    name="specforge",
    suffixes=(".ckpt", ".ckpt.gz"),
    signs=frozenset({"aux_hidden_state"}),
    lay_out=lay_out,
)
