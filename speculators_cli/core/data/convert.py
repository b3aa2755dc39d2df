"""Rewrite one v0 sample as a v1 sample."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from speculators_cli.core.data.formats import v0, v1
from speculators_cli.core.data.sample import BadSampleError, SampleHeader, States, refusing_sample
from speculators_cli.core.data.stored import StoredStates
from speculators_cli.core.files import replacing
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.archive_writer import ArchiveWriter
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-12  # avoids division by zero for tokens of zeros


@dataclass(frozen=True, eq=False)
class Changes:
    """Changes of hidden states in a conversion; without any, their bytes are copied unchanged."""

    dtype: str | None  # of the written hidden states; None: unchanged
    norm_weight: "Tensor | None"  # [hidden], float32: of the verifier's final norm, to undo it

    def header(self, source: SampleHeader) -> SampleHeader:
        """Return the header of the v1 sample for a v0 sample."""
        return replace(source, dtype=self.dtype or source.dtype, is_normed=self.norm_weight is None)

    def origin(self, source: Archive) -> str | None:
        """Return the inputs of changed states: checksums of the source, and a hash of the weights.

        None where all states are copied: their own checksums are the source's.
        """
        layers = v0.FORMAT.read_layout(source).hidden_states
        if self.norm_weight is None and all(self.dtype in (None, spec.dtype) for spec in layers):
            return None
        storages = {spec.storage_key: spec for spec in layers}
        parts = [f"{source.checksum(spec):08x}" for spec in storages.values()]
        if self.norm_weight is not None:
            parts.append(sha256(self.norm_weight.numpy().tobytes()).hexdigest())
        return " ".join(parts)


@refusing_sample()
def convert_file(source: Path, output: Path, changes: Changes) -> float:
    """Write the v1 sample of a v0 file, atomically and flushed to disk.

    The aux layers are columns of one matrix in v0. Last hidden states are kept and
    marked as normed, or divided by the norm weights.

    Args:
        source: Read in chunks where values change, otherwise copied by the system.
        output: Replaced if it exists.
        changes: Changes of the hidden states.

    Returns:
        The largest error of any element, after the norm is applied again, relative to the largest
        element of its token; 0 if the norm is not undone.

    Raises:
        BadSampleError: The source is not a v0 sample, or changed values are damaged.
        OSError: A file cannot be read or written.
    """
    tokens = v0.FORMAT.read_tokens(source)
    header = changes.header(tokens.header())
    if changes.norm_weight is not None and len(changes.norm_weight) != header.hidden_size:
        raise BadSampleError(
            f"has hidden size {header.hidden_size:,}, but the verifier has "
            f"{len(changes.norm_weight):,}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        Archive(source) as archive,
        replacing(output) as temporary,
        temporary.open("wb", buffering=0) as stream,
    ):
        writer = ArchiveWriter(stream, origin=changes.origin(archive))
        layers, error = _write_states(writer, archive, changes)
        v1.finish(
            writer,
            layers,
            tokens.input_ids,
            tokens.loss_mask,
            is_normed=changes.norm_weight is None,
        )
        os.fsync(stream.fileno())
    return error


def _write_states(
    writer: ArchiveWriter, source: Archive, changes: Changes
) -> tuple[list[TensorSpec], float]:
    """Write all layers; return their specs, and the round-trip error of the last."""
    *aux, last = v0.FORMAT.read_layout(source).hidden_states
    errors = [0.0]

    def write(spec: TensorSpec, norm_weight: "Tensor | None") -> TensorSpec:
        dtype = changes.dtype or spec.dtype
        if norm_weight is None and spec.dtype == dtype:
            return writer.copy(source, spec)
        # Changed values get a new checksum, which would hide damage of the source.
        source.verify(spec)
        states = StoredStates.of(source, spec)

        def rows() -> Iterator["Tensor"]:
            for changed, error in change(states, dtype, norm_weight):
                errors.append(error)
                yield changed

        return v1.write_rows(writer, rows(), dtype, spec.shape)

    layers = [write(spec, None) for spec in aux]
    return [*layers, write(last, changes.norm_weight)], max(errors)


def change(
    states: States,  # [seq_len, hidden]
    dtype: str | None,  # of the written values; None: unchanged
    norm_weight: "Tensor | None",  # [hidden], float32
) -> Iterator[tuple["Tensor", float]]:
    """Yield the states of a v1 sample in chunks of tokens, each with its round-trip error."""
    import torch

    wanted: torch.dtype = states.dtype if dtype is None else getattr(torch, dtype)
    for rows in states.split(v1.ROWS_AT_ONCE):
        yield (
            (rows.to(wanted), 0.0) if norm_weight is None else undo_norm(rows, norm_weight, wanted)
        )


def undo_norm(
    last: "Tensor", norm_weight: "Tensor", dtype: "torch.dtype"
) -> tuple["Tensor", float]:
    """Return states whose RMSNorm with these weights is `last`, and the error.

    A normed state is a unit-RMS state times the norm weights. Divided by them, it has the same norm
    again, whatever its scale was before.

    Returns:
        [seq_len, hidden] in `dtype`; the largest error of any element, relative to the largest
        element of its token.
    """
    normed = last.float()
    undone = (normed / norm_weight).to(dtype)
    scale = undone.float().pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    again = undone.float() * scale * norm_weight
    largest = normed.abs().amax(-1, keepdim=True).clamp(min=EPS)
    error = ((again - normed).abs() / largest).max().item() if normed.numel() else 0.0
    return undone, error


def is_converted(source: Path, output: Path, changes: Changes) -> bool:
    """Whether a file is the v1 sample that `convert_file` would write.

    Tokens, dtypes and the checksums of hidden states are compared; no states are read.
    """
    if not output.exists():
        return False
    try:
        old, new = v0.FORMAT.read_tokens(source), v1.FORMAT.read_tokens(output)
        return (
            new.header() == changes.header(old.header())
            and old.input_ids.tobytes() == new.input_ids.tobytes()
            and old.loss_mask.tobytes() == new.loss_mask.tobytes()
            and _has_same_states(source, output, changes)
        )
    except (BadSampleError, OSError):
        return False


@refusing_sample()
def _has_same_states(source: Path, output: Path, changes: Changes) -> bool:
    """Whether copied states have the source's checksums, and changed ones are derived from it."""
    with Archive(source) as old, Archive(output) as new:
        origin = changes.origin(old)
        if origin is not None or new.origin is not None:
            return origin == new.origin
        pairs = zip(
            v0.FORMAT.read_layout(old).hidden_states,
            v1.FORMAT.read_layout(new).hidden_states,
            strict=True,
        )
        return all(_identity(old, given) == _identity(new, copied) for given, copied in pairs)


def _identity(archive: Archive, spec: TensorSpec) -> tuple[object, ...]:
    """Return everything that is known of a tensor without reading it."""
    return archive.checksum(spec), spec.dtype, spec.offset, spec.shape, spec.stride


def has_same_values(source: Path, output: Path, changes: Changes) -> bool:
    """Whether a written v1 file has all values of the v0 file."""
    import torch

    if not is_converted(source, output, changes):
        return False
    old, new = v0.FORMAT.read_sample(source), v1.FORMAT.read_sample(output)
    pairs = [
        *((a, b, None) for a, b in zip(old.aux_hidden_states, new.aux_hidden_states, strict=True)),
        (old.last_hidden_states, new.last_hidden_states, changes.norm_weight),
    ]
    return all(
        torch.equal(given.contiguous().view(torch.uint8), read.contiguous().view(torch.uint8))
        for before, after, norm_weight in pairs
        for (given, _), read in zip(
            change(before, changes.dtype, norm_weight), after.split(v1.ROWS_AT_ONCE), strict=True
        )
    )
