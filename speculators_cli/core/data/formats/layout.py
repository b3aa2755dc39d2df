"""Layout: where the parts of a sample are in its file, checked before they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import BadSampleError, check_ids, refusing_sample
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

HIDDEN_STATE_DTYPES = ("bfloat16", "float16", "float32", "float64")
FLOAT8 = "float8_e4m3fn"  # only along with scales
INTEGER_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32")
MASK_DTYPES = ("bool", *INTEGER_DTYPES, *HIDDEN_STATE_DTYPES)
SCALES = "hidden_states_scales"  # key of this package


@dataclass(frozen=True)
class Layout:
    """Location of the parts of a sample in its file; nothing has been read."""

    input_ids: TensorSpec  # [seq_len]
    loss_mask: TensorSpec  # [seq_len]
    hidden_states: tuple[TensorSpec, ...]  # [seq_len, hidden] each: the aux layers, then the last
    is_normed: bool | TensorSpec
    scales: tuple[TensorSpec, ...] = ()  # [seq_len], of each layer of float8 values
    # Whether the last layer and its scales have rows for supervised tokens only.
    is_supervised_only: bool | TensorSpec = False

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Return all tensors but flags."""
        return (self.input_ids, self.loss_mask, *self.hidden_states, *self.scales)


@dataclass(frozen=True)
class Values:
    """The parts of a sample that are read with its header."""

    input_ids: NDArray[np.int64]  # [seq_len]
    loss_mask: NDArray[np.bool_]  # [seq_len]
    is_normed: bool
    scales: tuple[NDArray[np.float32], ...]  # [rows], of each layer of float8 values
    is_supervised_only: bool


def check_layout(layout: Layout, file_bytes: int) -> None:
    """Check types and shapes, and that the parts together are not larger than the file.

    Raises:
        BadSampleError: They do not match. The number of rows at supervised tokens is not checked.
    """
    _check_tokens(layout)
    _check_states(layout)
    # A flag in a tensor has not been read.
    is_whole = layout.is_supervised_only is False
    _check_rows(layout.hidden_states if is_whole else layout.hidden_states[:-1], layout)
    _check_scales(layout)
    claimed = sum(spec.num_bytes for spec in layout.parts)
    if claimed > file_bytes:
        raise BadSampleError(f"claims {claimed:,} bytes of tensors; the file has {file_bytes:,}")


def _check_states(layout: Layout) -> None:
    """Check types and widths of the layers."""
    width = layout.hidden_states[-1].shape[-1:]
    for index, spec in enumerate(layout.hidden_states):
        _check_dtype(spec, has_scales=bool(layout.scales))
        if len(spec.shape) != 2:
            raise BadSampleError(f"has hidden states of shape {list(spec.shape)} in layer {index}")
        if spec.shape[1:] != width:
            raise BadSampleError(
                f"has hidden size {spec.shape[1]:,} in layer {index}, {width[0]:,} in the last"
            )
    if len(layout.hidden_states) < 2 or width == (0,):
        raise BadSampleError("has no aux hidden states")


def _check_dtype(spec: TensorSpec, *, has_scales: bool) -> None:
    if spec.dtype == FLOAT8 and not has_scales:
        raise BadSampleError(f"has float8 hidden states without `{SCALES}`")
    if spec.dtype not in ((FLOAT8,) if has_scales else HIDDEN_STATE_DTYPES):
        expected = f"{FLOAT8} with `{SCALES}`" if has_scales else "floats"
        raise BadSampleError(f"has hidden states of type {spec.dtype}, expected {expected}")


def _check_tokens(layout: Layout) -> None:
    for key, spec, dtypes in (
        ("input_ids", layout.input_ids, INTEGER_DTYPES),
        ("loss_mask", layout.loss_mask, MASK_DTYPES),
    ):
        if len(spec.shape) != 1:
            raise BadSampleError(f"has `{key}` of shape {list(spec.shape)}, expected [seq_len]")
        if spec.dtype not in dtypes:
            raise BadSampleError(f"has `{key}` of type {spec.dtype}")
    num_ids, num_mask = layout.input_ids.shape[0], layout.loss_mask.shape[0]
    if num_ids != num_mask:
        raise BadSampleError(f"has {num_ids:,} input ids but a loss mask of {num_mask:,}")


def _check_rows(layers: Sequence[TensorSpec], layout: Layout) -> None:
    num_tokens = layout.input_ids.shape[0]
    for index, spec in enumerate(layers):
        if spec.shape[0] != num_tokens:
            raise BadSampleError(
                f"has {num_tokens:,} input ids but {spec.shape[0]:,} hidden states in layer {index}"
            )


def _check_scales(layout: Layout) -> None:
    if not layout.scales:
        return
    if len(layout.scales) != len(layout.hidden_states):
        raise BadSampleError(
            f"has `{SCALES}` of {len(layout.scales):,} layers, expected "
            f"{len(layout.hidden_states):,}"
        )
    pairs = zip(layout.scales, layout.hidden_states, strict=True)
    for index, (scales, states) in enumerate(pairs):
        if scales.dtype != "float32":
            raise BadSampleError(f"has `{SCALES}` of type {scales.dtype}, expected float32")
        if scales.shape != states.shape[:1]:
            raise BadSampleError(
                f"has `{SCALES}` of shape {list(scales.shape)} in layer {index}, expected "
                f"{list(states.shape[:1])}"
            )


@refusing_sample()
def read_values(archive: Archive, layout: Layout) -> Values:
    """Read all parts of a sample but its hidden states.

    Raises:
        BadSampleError: A value is invalid, or hidden states of supervised tokens are missing.
    """
    input_ids, loss_mask = _read_tokens(archive, layout)
    is_supervised_only = _read_flag(archive, layout.is_supervised_only)
    num_rows, num_supervised = layout.hidden_states[-1].shape[0], int(loss_mask.sum())
    if not is_supervised_only:
        _check_rows(layout.hidden_states, layout)
    elif num_rows != num_supervised:
        raise BadSampleError(
            f"has {num_rows:,} last hidden states for {num_supervised:,} supervised tokens"
        )
    scales = tuple(archive.read(spec) for spec in layout.scales)
    for index, values in enumerate(scales):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise BadSampleError(f"has negative or non-finite `{SCALES}` in layer {index}")
    is_normed = _read_flag(archive, layout.is_normed)
    return Values(input_ids, loss_mask, is_normed, scales, is_supervised_only)


def _read_tokens(archive: Archive, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Read input ids [seq_len] and loss mask [seq_len], in NumPy."""
    input_ids = archive.read(layout.input_ids).astype(np.int64)
    mask = archive.read(layout.loss_mask)
    if mask.dtype == np.bool_:
        mask = mask.view(np.uint8)  # other bytes than 0 and 1 are invalid
    is_supervised: NDArray[np.bool_] = mask == 1
    if not (is_supervised | (mask == 0)).all():
        raise BadSampleError("has values other than 0 and 1 in `loss_mask`")
    check_ids(input_ids, "input_ids")
    return input_ids, is_supervised


def _read_flag(archive: Archive, flag: bool | TensorSpec) -> bool:
    if isinstance(flag, bool):
        return flag
    if flag.num_elements != 1 or flag.dtype not in MASK_DTYPES:
        raise BadSampleError(
            f"has a flag of shape {list(flag.shape)} and type {flag.dtype}, expected one value"
        )
    return bool(archive.read(flag).item())
