"""Format v1: a list of layers, the last of them before the final norm unless marked otherwise."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.formats.format import (
    Layout,
    SampleFormat,
    get_tensor,
    late_layer_ids,
)
from speculators_cli.core.data.sample import BadSampleError, Sample
from speculators_cli.core.files import replacing
from speculators_cli.core.torch_file.archive_writer import ArchiveWriter
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

IS_NORMED = "last_hidden_state_is_normed"  # key of this package: absent means False
ROWS_AT_ONCE = 1024  # tokens written at a time


def lay_out(content: Mapping[object, object]) -> Layout:
    """Find the parts: `hidden_states`, a list of [seq_len, hidden], aux layers first.

    Raises:
        BadSampleError: A part is missing or invalid.
    """
    input_ids, loss_mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    layers = content.get("hidden_states")
    if not isinstance(layers, list | tuple):
        get_tensor(content, "hidden_states")  # raises for missing or non-tensor values
        raise BadSampleError("has a single tensor as `hidden_states`, expected a list of layers")
    specs = [layer for layer in layers if isinstance(layer, TensorSpec)]
    if len(specs) != len(layers) or len(specs) < 2:
        raise BadSampleError(
            f"has {len(specs):,} tensors among the {len(layers):,} entries of `hidden_states`, "
            "expected two or more tensors only"
        )
    is_normed = content.get(IS_NORMED, False)
    if not isinstance(is_normed, bool | TensorSpec):
        raise BadSampleError(f"has no boolean as `{IS_NORMED}`")
    return Layout(input_ids, loss_mask, tuple(spec.without_batch(2) for spec in specs), is_normed)


def write_sample(sample: Sample, file: Path) -> None:
    """Write a sample atomically."""
    layers = (*sample.aux_hidden_states, sample.last_hidden_states)
    with replacing(file) as temporary, temporary.open("wb") as stream:
        writer = ArchiveWriter(stream)
        specs = [
            write_rows(writer, x.split(ROWS_AT_ONCE), str(x.dtype).removeprefix("torch."), x.shape)
            for x in layers
        ]
        input_ids, loss_mask = sample.input_ids.numpy(), sample.loss_mask.numpy()
        finish(writer, specs, input_ids, loss_mask, is_normed=sample.is_normed)


def finish(
    writer: ArchiveWriter,
    hidden_states: Sequence[TensorSpec],
    input_ids: NDArray[np.int64],  # [seq_len]
    loss_mask: NDArray[np.bool_],  # [seq_len]
    *,
    is_normed: bool,
) -> None:
    """Write ids, mask and metadata, once the hidden states are written."""
    content: dict[str, object] = {
        "input_ids": writer.add([input_ids.tobytes()], "int64", input_ids.shape),
        "loss_mask": writer.add([loss_mask.tobytes()], "bool", loss_mask.shape),
        "hidden_states": list(hidden_states),
    }
    if is_normed:
        content[IS_NORMED] = writer.add([b"\1"], "bool", ())
    writer.finish(content)


def write_rows(
    writer: ArchiveWriter, rows: Iterable["Tensor"], dtype: str, shape: Sequence[int]
) -> TensorSpec:
    """Write hidden states [seq_len, hidden] in chunks of tokens, to bound memory."""
    import torch

    parts = (x.contiguous().view(torch.uint8).flatten().numpy().data for x in rows)
    return writer.add(parts, dtype, shape)


FORMAT = SampleFormat(
    name="v1",
    version=1,
    suffixes=(".pt",),
    signs=frozenset({"hidden_states"}),
    lay_out=lay_out,
    usual_layer_ids=late_layer_ids,
)
