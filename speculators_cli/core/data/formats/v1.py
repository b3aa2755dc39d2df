"""Format v1: a list of layers, the last of them before the final norm unless it says otherwise."""

from collections.abc import Mapping

import torch

from speculators_cli.core.data.formats.format import (
    Layout,
    SampleFormat,
    get_tensor,
    own_memory,
    refuse_foreign,
)
from speculators_cli.core.data.formats.structure import TensorSpec
from speculators_cli.core.data.sample import BadSampleError, Sample

IS_NORMED = "last_hidden_state_is_normed"  # our own key: absent means False


def lay_out(content: Mapping[object, object]) -> Layout:
    """Find the parts: `hidden_states`, a list of [seq_len, hidden], aux layers first.

    Raises:
        BadSampleError: The file holds something else.
    """
    refuse_foreign(content)
    if "hidden_state" in content and "target" in content:
        raise BadSampleError("is a v0 sample, read as v1", other_format="v0")
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    layers = content.get("hidden_states")
    if not isinstance(layers, list | tuple):
        get_tensor(content, "hidden_states")  # names what is missing
        raise BadSampleError("has one tensor as `hidden_states`, expected a list of layers")
    specs = [layer for layer in layers if isinstance(layer, TensorSpec)]
    if len(specs) != len(layers) or len(specs) < 2:
        raise BadSampleError(
            f"has {len(specs):,} tensors among the {len(layers):,} entries of `hidden_states`, "
            "expected two or more tensors and nothing else"
        )
    is_normed = content.get(IS_NORMED, False)
    if not isinstance(is_normed, bool | TensorSpec):
        raise BadSampleError(f"has no truth value as `{IS_NORMED}`")
    return Layout(input_ids, loss_mask, tuple(spec.without_batch() for spec in specs), is_normed)


def arrange(sample: Sample) -> dict[str, object]:
    """Name the parts of a sample."""
    layers = (*sample.aux_hidden_states, sample.last_hidden_states)
    content: dict[str, object] = {
        "input_ids": own_memory(sample.input_ids),
        "loss_mask": own_memory(sample.loss_mask),
        "hidden_states": [own_memory(layer) for layer in layers],
    }
    if sample.is_normed:
        content[IS_NORMED] = torch.tensor(True)
    return content


FORMAT = SampleFormat("v1", (".pt",), lay_out, arrange)
