"""Format v1: a list of layers, the last of them before the final norm unless marked otherwise."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.float8 import ScaledStates, quantize_rows
from speculators_cli.core.data.formats.format import SampleFormat, get_tensor, late_layer_ids
from speculators_cli.core.data.formats.layout import FLOAT8, SCALES, Layout
from speculators_cli.core.data.sample import BadSampleError, Sample, States
from speculators_cli.core.data.supervised_rows import SupervisedRows, held_states
from speculators_cli.core.files import replacing
from speculators_cli.core.torch_file.archive_writer import ArchiveWriter
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# Keys of this package: absent means False.
IS_NORMED = "last_hidden_state_is_normed"
IS_SUPERVISED_ONLY = "last_hidden_state_is_supervised_only"
ROWS_AT_ONCE = 1024  # tokens written at a time
QUANTIZED_AT_ONCE = 64
StorageDtype = Literal["bfloat16", "float8"]


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
    return Layout(
        input_ids,
        loss_mask,
        tuple(spec.without_batch(2) for spec in specs),
        is_normed=_get_flag(content, IS_NORMED),
        scales=_get_scales(content),
        is_supervised_only=_get_flag(content, IS_SUPERVISED_ONLY),
    )


def _get_flag(content: Mapping[object, object], key: str) -> bool | TensorSpec:
    flag = content.get(key, False)
    if not isinstance(flag, bool | TensorSpec):
        raise BadSampleError(f"has no boolean as `{key}`")
    return flag


def _get_scales(content: Mapping[object, object]) -> tuple[TensorSpec, ...]:
    if SCALES not in content:
        return ()
    layers = content[SCALES]
    found = layers if isinstance(layers, list | tuple) else ()
    specs = tuple(layer for layer in found if isinstance(layer, TensorSpec))
    if not specs or len(specs) != len(found):
        raise BadSampleError(f"has no list of tensors as `{SCALES}`")
    return specs


def write_sample(
    sample: Sample,
    file: Path,
    *,
    storage_dtype: StorageDtype | None = None,
    supervised_only: bool = False,
) -> None:
    """Write a sample atomically; equal samples become equal bytes.

    Args:
        sample: Layers that are `ScaledStates` are not quantized again, and last hidden states that
            are `SupervisedRows` are written as they are.
        file: Replaced if it exists.
        storage_dtype: Dtype of the written hidden states; `float8` has a scale per token and layer.
            None: unchanged.
        supervised_only: Whether to write last hidden states at supervised tokens only.
    """
    *aux, last = (*sample.aux_hidden_states, sample.last_hidden_states)
    is_held = isinstance(last, SupervisedRows)
    rows = sample.loss_mask.nonzero().flatten() if supervised_only and not is_held else None
    layers = [*(LayerRows(states) for states in aux), LayerRows(held_states(last), rows)]
    is_float8 = storage_dtype == "float8" or (
        storage_dtype is None and all(isinstance(x.states, ScaledStates) for x in layers)
    )
    with replacing(file) as temporary, temporary.open("wb") as stream:
        writer = ArchiveWriter(stream)
        scales: list[Tensor] = []
        if is_float8:
            specs = [_write_float8(writer, layer, scales) for layer in layers]
        else:
            specs = [_write_floats(writer, layer, storage_dtype) for layer in layers]
        input_ids, loss_mask = sample.input_ids.numpy(), sample.loss_mask.numpy()
        finish(
            writer,
            specs,
            input_ids,
            loss_mask,
            is_normed=sample.is_normed,
            scales=scales,
            is_supervised_only=supervised_only or is_held,
        )


def finish(
    writer: ArchiveWriter,
    hidden_states: Sequence[TensorSpec],
    input_ids: NDArray[np.int64],  # [seq_len]
    loss_mask: NDArray[np.bool_],  # [seq_len]
    *,
    is_normed: bool,
    scales: Sequence["Tensor"] = (),  # [rows] of each layer, float32
    is_supervised_only: bool = False,
) -> None:
    """Write ids, mask and metadata, once the hidden states are written."""
    content: dict[str, object] = {}
    if scales:
        content[SCALES] = _write_scales(writer, scales)
    content |= {
        "input_ids": writer.add([input_ids.tobytes()], "int64", input_ids.shape),
        "loss_mask": writer.add([loss_mask.tobytes()], "bool", loss_mask.shape),
        "hidden_states": list(hidden_states),
    }
    flags = {IS_NORMED: is_normed, IS_SUPERVISED_ONLY: is_supervised_only}
    content |= {key: writer.add([b"\1"], "bool", ()) for key, flag in flags.items() if flag}
    writer.finish(content)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The rows of a layer to write."""

    states: States
    rows: "Tensor | None" = None  # [rows], int64, ascending; None: all

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows, and their width."""
        num_rows = len(self.states) if self.rows is None else len(self.rows)
        return num_rows, self.states.shape[1]

    def split(self, num_rows: int) -> Iterator["slice | Tensor"]:
        """Yield the indices of all rows, `num_rows` at a time."""
        for start in range(0, self.shape[0], num_rows):
            part = slice(start, start + num_rows)
            yield part if self.rows is None else self.rows[part]


def _write_floats(
    writer: ArchiveWriter, layer: LayerRows, storage_dtype: StorageDtype | None
) -> TensorSpec:
    import torch

    states = layer.states
    dtype = torch.bfloat16 if storage_dtype == "bfloat16" else states.dtype
    rows = (states[part].to(dtype) for part in layer.split(ROWS_AT_ONCE))
    return write_rows(writer, rows, str(dtype).removeprefix("torch."), layer.shape)


def _write_float8(writer: ArchiveWriter, layer: LayerRows, scales: list["Tensor"]) -> TensorSpec:
    """Write a layer as float8; its scales are appended to `scales`."""
    import torch

    own = [torch.empty(0)]

    def rows() -> Iterator["Tensor"]:
        for part in layer.split(QUANTIZED_AT_ONCE):
            values, of_rows = _quantize(layer.states, part)
            own.append(of_rows)
            yield values

    spec = write_rows(writer, rows(), FLOAT8, layer.shape)
    scales.append(torch.cat(own))
    return spec


def _quantize(states: States, rows: "slice | Tensor") -> tuple["Tensor", "Tensor"]:
    if isinstance(states, ScaledStates):
        return states.values[rows], states.scales[rows].squeeze(-1)
    return quantize_rows(states[rows])


def _write_scales(writer: ArchiveWriter, scales: Sequence["Tensor"]) -> list[TensorSpec]:
    """Write the scales of all layers, as views of one storage."""
    counts = [len(of_layer) for of_layer in scales]
    parts = [of_layer.numpy().tobytes() for of_layer in scales]
    whole = writer.add(parts, "float32", (sum(counts),))
    starts = [0, *accumulate(counts)][:-1]
    return [
        replace(whole, offset=start, shape=(n,)) for start, n in zip(starts, counts, strict=True)
    ]


def write_rows(
    writer: ArchiveWriter, rows: Iterable["Tensor"], dtype: str, shape: Sequence[int]
) -> TensorSpec:
    """Write hidden states [rows, hidden] in chunks of rows, to bound memory."""
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
