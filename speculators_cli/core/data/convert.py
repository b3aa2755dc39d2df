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
from speculators_cli.core.torch_file.structure import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-12  # keeps tokens of zeros from dividing by zero


@dataclass(frozen=True, eq=False)
class Changes:
    """What conversion changes of hidden states; without any their bytes are copied as they lie."""

    dtype: str | None  # of the written hidden states; None: as read
    norm_weight: "Tensor | None"  # [hidden], float32: of the verifier's final norm, to undo it

    def header(self, source: SampleHeader) -> SampleHeader:
        """The header of the v1 sample that a v0 sample becomes."""
        return replace(source, dtype=self.dtype or source.dtype, is_normed=self.norm_weight is None)

    def origin(self, source: Archive) -> str | None:
        """What changed states are computed from: checksums of the source, and the norm weights.

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
def convert_file(source: Path, target: Path, changes: Changes) -> float:
    """Write the v1 sample of a v0 file; it appears whole, on disk, or not at all.

    The aux layers are columns of the one matrix that v0 holds. Last hidden states are kept and
    marked as normed, or divided by the norm weights.

    Args:
        source: Read in part at a time where its values change, else copied by the system.
        target: Replaced if it exists.
        changes: Of the hidden states.

    Returns:
        The largest error of any element, once the norm is applied again, relative to the largest
        of its token; 0 where the norm is kept.

    Raises:
        BadSampleError: The source is not a v0 sample, or values that change are damaged.
        OSError: A file cannot be read or written.
    """
    tokens = v0.FORMAT.read_tokens(source)
    header = changes.header(tokens.header())
    if changes.norm_weight is not None and len(changes.norm_weight) != header.hidden_size:
        raise BadSampleError(
            f"has hidden size {header.hidden_size:,}, the verifier {len(changes.norm_weight):,}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        Archive(source) as archive,
        replacing(target) as temporary,
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
    """Write all layers; returns where they are, and the round-trip error of the last."""
    *aux, last = v0.FORMAT.read_layout(source).hidden_states
    errors = [0.0]

    def write(spec: TensorSpec, norm_weight: "Tensor | None") -> TensorSpec:
        dtype = changes.dtype or spec.dtype
        if norm_weight is None and spec.dtype == dtype:
            return writer.copy(source, spec)
        # What is computed gets a checksum of its own, which would hide that its source is damaged.
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
    dtype: str | None,  # of what is written; None: as read
    norm_weight: "Tensor | None",  # [hidden], float32
) -> Iterator[tuple["Tensor", float]]:
    """The states a v1 sample gets, some tokens at a time, each with its round-trip error."""
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


def is_converted(source: Path, target: Path, changes: Changes) -> bool:
    """Whether a file is the v1 sample that `convert_file` would write.

    Tokens and types are compared, and checksums of hidden states: no state is read.
    """
    if not target.exists():
        return False
    try:
        old, new = v0.FORMAT.read_tokens(source), v1.FORMAT.read_tokens(target)
        return (
            new.header() == changes.header(old.header())
            and old.input_ids.tobytes() == new.input_ids.tobytes()
            and old.loss_mask.tobytes() == new.loss_mask.tobytes()
            and _has_same_states(source, target, changes)
        )
    except (BadSampleError, OSError):
        return False


@refusing_sample()
def _has_same_states(source: Path, target: Path, changes: Changes) -> bool:
    """Whether states that are copied have the source's checksums, and others come from it."""
    with Archive(source) as old, Archive(target) as new:
        origin = changes.origin(old)
        if origin is not None or new.origin is not None:
            return origin == new.origin
        pairs = zip(
            v0.FORMAT.read_layout(old).hidden_states,
            v1.FORMAT.read_layout(new).hidden_states,
            strict=True,
        )
        return all(_describe(old, given) == _describe(new, copied) for given, copied in pairs)


def _describe(archive: Archive, spec: TensorSpec) -> tuple[object, ...]:
    """All that tells of a tensor without reading it."""
    return archive.checksum(spec), spec.dtype, spec.offset, spec.shape, spec.stride


def is_same(source: Path, target: Path, changes: Changes) -> bool:
    """Whether a v1 file, read back, holds every value that the v0 file gives."""
    import torch

    if not is_converted(source, target, changes):
        return False
    old, new = v0.FORMAT.read_sample(source), v1.FORMAT.read_sample(target)
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
