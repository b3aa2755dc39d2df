"""A data format: names and layout of the tensors of a sample in a `.pt` file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.sample import (
    BadSampleError,
    Sample,
    SampleTokens,
    check_ids,
    refusing_sample,
)
from speculators_cli.core.data.stored import StoredStates
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.tensor_spec import TensorSpec, find_common

HIDDEN_STATE_DTYPES = ("bfloat16", "float16", "float32", "float64")
INTEGER_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32")
MASK_DTYPES = ("bool", *INTEGER_DTYPES, *HIDDEN_STATE_DTYPES)


@dataclass(frozen=True)
class Layout:
    """Location of the parts of a sample in its file; nothing has been read."""

    input_ids: TensorSpec  # [seq_len]
    loss_mask: TensorSpec  # [seq_len]
    hidden_states: tuple[TensorSpec, ...]  # [seq_len, hidden] each: the aux layers, then the last
    is_normed: bool | TensorSpec


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """Reads the samples of one format."""

    name: str  # in settings and messages
    suffixes: tuple[str, ...]  # of the names of its files
    prefix: str = ""
    version: int | None = None  # of `--data-format-version`; None: `--data-format` has its name
    has_own_names: bool = False  # whether the file name identifies the format
    # Default aux layers of its generators, from the number of layers; None: vLLM's.
    usual_layer_ids: Callable[[int], tuple[int, ...]] | None = None
    conversion: str = ""  # command that converts its samples to v1

    @property
    def flag(self) -> str:
        """Return the flag to read samples of this format."""
        if self.version is None:
            return f"--data-format {self.name}"
        return f"--data-format-version {self.version}"

    def is_named(self, file_name: str) -> bool:
        """Whether a file of this name can be a sample of this format."""
        return file_name.startswith(self.prefix) and file_name.endswith(self.suffixes)

    def recognises(self, content: Mapping[object, object]) -> bool:  # noqa: ARG002
        """Whether the dict in a `.pt` file is a sample of this format."""
        return False

    def stamp_beside(self, folder: Path) -> str:  # noqa: ARG002
        """Return a stamp of the additional files that samples in a folder are read from."""
        return ""

    def verify(self, file: Path) -> None:  # noqa: B027 - a format may have no checksums
        """Verify the checksums of a sample.

        Raises:
            BadSampleError: A checksum does not match, or the file is not a sample.
            OSError: It cannot be opened.
        """

    @abstractmethod
    def read_sample(self, file: Path) -> Sample:
        """Read a sample; its hidden states are read on use."""

    @abstractmethod
    def read_tokens(self, file: Path) -> SampleTokens:
        """Read header, ids and mask of a sample, without its hidden states."""


@dataclass(frozen=True, kw_only=True)
class SampleFormat(Format):
    """Reads samples that are one file of `torch.save` each."""

    lay_out: Callable[
        [Mapping[object, object]], Layout
    ]  # content of a file -> location of its parts
    signs: frozenset[str]  # keys that identify the format

    def recognises(self, content: Mapping[object, object]) -> bool:
        """Whether a dict has all of these keys."""
        return self.signs <= content.keys()

    @refusing_sample()
    def verify(self, file: Path) -> None:
        """Verify the checksums of a sample."""
        with Archive(file) as archive:
            archive.verify()

    @refusing_sample()
    def read_sample(self, file: Path) -> Sample:
        """Read a sample: ids and mask into memory, hidden states on use.

        Raises:
            BadSampleError: The file is not a sample of this format.
            OSError: It cannot be opened.
        """
        import torch

        with Archive(file) as archive:
            layout = self.read_layout(archive)
            input_ids, loss_mask = _read_tokens(archive, layout)
            *aux, last = [StoredStates.of(archive, spec) for spec in layout.hidden_states]
            is_normed = _read_flag(archive, layout.is_normed)
        return Sample(
            torch.from_numpy(input_ids), torch.from_numpy(loss_mask), tuple(aux), last, is_normed
        )

    @refusing_sample()
    def read_tokens(self, file: Path) -> SampleTokens:
        """Read header, ids and mask of a sample, without its hidden states.

        Raises:
            BadSampleError: The file is not a sample of this format.
            OSError: It cannot be opened.
        """
        with Archive(file) as archive:
            return self.read_tokens_in(archive)

    @refusing_sample()
    def read_tokens_in(self, archive: Archive) -> SampleTokens:
        """Read header, ids and mask of the sample in an open file.

        Raises:
            BadSampleError: The file is not a sample of this format.
        """
        layout = self.read_layout(archive)
        input_ids, loss_mask = _read_tokens(archive, layout)
        return SampleTokens(
            input_ids,
            loss_mask,
            hidden_size=layout.hidden_states[-1].shape[1],
            num_aux_layers=len(layout.hidden_states) - 1,
            dtype=find_common(spec.dtype for spec in layout.hidden_states),
            is_normed=_read_flag(archive, layout.is_normed),
            fingerprint=archive.fingerprint,
        )

    @refusing_sample()
    def read_layout(self, archive: Archive) -> Layout:
        """Find and check the parts of a sample in its file.

        Raises:
            BadSampleError: The file is not a sample of this format.
        """
        content = archive.content
        if not isinstance(content, dict):
            raise BadSampleError(f"is {_kind(content)}, not a dict of tensors")
        _refuse_foreign(content, self.name)
        layout = self.lay_out(content)
        _check(layout, archive.num_bytes)
        for spec in (layout.input_ids, layout.loss_mask, *layout.hidden_states):
            archive.check(spec)
        return layout


def late_layer_ids(num_verifier_layers: int) -> tuple[int, ...]:
    """Return the default aux layers of the generators of `.pt` samples."""
    n = num_verifier_layers
    return (3, n // 2 + 1, n - 2)


def get_tensor(content: Mapping[object, object], key: str, num_dimensions: int = 1) -> TensorSpec:
    """Return the tensor of a key, without additional leading dimensions of size 1.

    Raises:
        BadSampleError: The key is missing, or not a tensor.
    """
    if key not in content:
        raise BadSampleError(f"has no `{key}`; found {_names(content)}")
    value = content[key]
    if not isinstance(value, TensorSpec):
        raise BadSampleError(f"has {_kind(value)} as `{key}`, expected a tensor")
    return value.without_batch(num_dimensions)


def split_columns(
    content: Mapping[object, object], key: str, last: TensorSpec, last_key: str
) -> list[TensorSpec]:
    """Split one matrix into its layers, each as wide as the last hidden states.

    Raises:
        BadSampleError: The sizes do not match.
    """
    aux = get_tensor(content, key, 2)
    if len(aux.shape) != 2 or len(last.shape) != 2:
        raise BadSampleError(
            f"has `{key}` of shape {list(aux.shape)} and `{last_key}` of shape "
            f"{list(last.shape)}, expected [seq_len, aux*hidden] and [seq_len, hidden]"
        )
    width, hidden_size = aux.shape[1], last.shape[1]
    if hidden_size == 0 or width == 0 or width % hidden_size:
        raise BadSampleError(
            f"has `{key}` {width:,} wide, not a multiple of the {hidden_size:,} of `{last_key}`"
        )
    return [aux.columns(start, start + hidden_size) for start in range(0, width, hidden_size)]


def _refuse_foreign(content: Mapping[object, object], name: str) -> None:
    """Reject samples of other formats and of other tools, with a specific message."""
    # The table imports this module.
    from speculators_cli.core.data.formats import FORMATS

    found = next((form.name for form in FORMATS.values() if form.recognises(content)), name)
    if found != name:
        raise BadSampleError(f"is a {found} sample, read as {name}", other_format=found)
    if "token_ids" in content and "input_ids" not in content:
        raise BadSampleError("has `token_ids` instead of `input_ids`, as in another tool's format")
    if content and all(isinstance(key, int) for key in content):
        raise BadSampleError("is a table of token counts, not a sample")


def _check(layout: Layout, file_bytes: int) -> None:
    """Check types and shapes, and that the parts together are not larger than the file."""
    _check_tokens(layout)
    num_tokens = layout.input_ids.shape[0]
    last = layout.hidden_states[-1]
    for index, spec in enumerate(layout.hidden_states):
        if spec.dtype not in HIDDEN_STATE_DTYPES:
            raise BadSampleError(f"has hidden states of type {spec.dtype}, expected floats")
        if len(spec.shape) != 2:
            raise BadSampleError(f"has hidden states of shape {list(spec.shape)} in layer {index}")
        if spec.shape[0] != num_tokens:
            raise BadSampleError(
                f"has {num_tokens:,} input ids but {spec.shape[0]:,} hidden states in layer {index}"
            )
        if spec.shape[1] != last.shape[1]:
            raise BadSampleError(
                f"has hidden size {spec.shape[1]:,} in layer {index}, {last.shape[1]:,} in the last"
            )
    if len(layout.hidden_states) < 2 or last.shape[1] == 0:
        raise BadSampleError("has no aux hidden states")
    parts = (layout.input_ids, layout.loss_mask, *layout.hidden_states)
    claimed = sum(spec.num_bytes for spec in parts)
    if claimed > file_bytes:
        raise BadSampleError(f"claims {claimed:,} bytes of tensors; the file has {file_bytes:,}")


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


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, TensorSpec) else f"a {type(value).__name__}"


def _names(content: Mapping[object, object]) -> str:
    names = [f"`{key[:40]}`" for key in content if isinstance(key, str)]
    return ", ".join(names[:8]) or "no keys"
