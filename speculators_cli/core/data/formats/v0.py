"""Format v0: aux hidden states in one matrix, last hidden states after the final norm."""

from collections.abc import Mapping

from speculators_cli.core.data.formats.format import (
    SampleFormat,
    get_tensor,
    late_layer_ids,
    split_columns,
)
from speculators_cli.core.data.formats.layout import Layout


def lay_out(content: Mapping[object, object]) -> Layout:
    """Locate the tensors: `hidden_state` [seq_len, aux*hidden] and `target` [seq_len, hidden].

    Raises:
        BadSampleError: A tensor is missing.
    """
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    last = get_tensor(content, "target", 2)
    layers = split_columns(content, "hidden_state", last, "target")
    return Layout(input_ids, loss_mask, (*layers, last), is_normed=True)


FORMAT = SampleFormat(
    name="v0",
    version=0,
    suffixes=(".pt", ".ckpt"),
    signs=frozenset({"hidden_state", "target"}),
    lay_out=lay_out,
    usual_layer_ids=late_layer_ids,
    conversion="speculators convert-v0",
)
