"""Rewrite one v0 sample as a v1 sample."""

import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.formats.archive import Archive
from speculators_cli.core.data.formats.format import get_tensor, save
from speculators_cli.core.data.formats.v0 import FORMAT as V0
from speculators_cli.core.data.sample import BadSampleError
from speculators_cli.core.files import replacing

EPS = 1e-12  # keeps tokens of zeros from dividing by zero


def convert_file(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None,
    gain: Tensor | None,  # [hidden], float32
) -> float:
    """Write the v1 sample of a v0 file; it appears whole, on disk, or not at all.

    The aux layers are written as columns of the one matrix that v0 holds, so its bytes are copied
    as they lie. Last hidden states are kept and marked as normed, or divided by the norm's gain.

    Args:
        source: Read through a memory map.
        target: Replaced if it exists.
        dtype: Of the written hidden states; None: as read.
        gain: Of the verifier's final norm, to undo it; None keeps the states.

    Returns:
        The largest error of any element, once the norm is applied again, relative to the largest
        of its token; 0 without `gain`.

    Raises:
        BadSampleError: The source is not a v0 sample.
        OSError: A file cannot be read or written.
    """
    tokens = V0.read_tokens(source)
    hidden_size = tokens.header.hidden_size
    if gain is not None and len(gain) != hidden_size:
        raise BadSampleError(f"has hidden size {hidden_size:,}, the verifier {len(gain):,}")
    with Archive(source) as archive:
        content = archive.content
        assert isinstance(content, dict), "its tokens have been read"
        aux, last = archive.map(
            (get_tensor(content, "hidden_state"), get_tensor(content, "target"))
        )
    dtype, error = dtype or last.dtype, 0.0
    if gain is not None:
        last, error = undo_norm(last, gain, dtype)
    sample: dict[str, object] = {
        "input_ids": torch.from_numpy(tokens.input_ids),
        "loss_mask": torch.from_numpy(tokens.loss_mask),
        "hidden_states": [*aux.to(dtype).split(hidden_size, dim=1), last.to(dtype)],
    }
    if gain is None:
        sample[v1.IS_NORMED] = torch.tensor(True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, temporary.open("wb") as stream:
        save(sample, stream)
        _flush(stream)
    return error


def undo_norm(last: Tensor, gain: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """States whose RMSNorm with this gain is `last`, and how far it is off.

    A normed state is a unit-RMS state times the gain, so dividing by the gain leaves one whose norm
    it is again, whatever its scale was before.

    Returns:
        [seq_len, hidden] in `dtype`; the largest error of any element, relative to the largest
        element of its token.
    """
    normed = last.float()
    undone = (normed / gain).to(dtype)
    scale = undone.float().pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    again = undone.float() * scale * gain
    largest = normed.abs().amax(-1, keepdim=True).clamp(min=EPS)
    error = ((again - normed).abs() / largest).max().item() if normed.numel() else 0.0
    return undone, error


def is_converted(source: Path, target: Path, *, dtype: torch.dtype | None, is_normed: bool) -> bool:
    """Whether a file is the v1 sample that `convert_file` would write, by its tokens and types."""
    try:
        old, new = V0.read_tokens(source), v1.FORMAT.read_tokens(target)
    except (BadSampleError, OSError):
        return False
    expected = replace(old.header, dtype=dtype or old.header.dtype, is_normed=is_normed)
    return (
        new.header == expected
        and old.input_ids.tobytes() == new.input_ids.tobytes()
        and old.loss_mask.tobytes() == new.loss_mask.tobytes()
    )


def is_same(source: Path, target: Path, *, dtype: torch.dtype | None, is_normed: bool) -> bool:
    """Whether a v1 file holds every value of a v0 file, read back from both.

    Last hidden states whose norm was undone are other values, and are not compared.
    """
    if not is_converted(source, target, dtype=dtype, is_normed=is_normed):
        return False
    old, new = V0.read_sample(source), v1.FORMAT.read_sample(target)
    pairs = [*zip(old.aux_hidden_states, new.aux_hidden_states, strict=True)]
    if is_normed:
        pairs.append((old.last_hidden_states, new.last_hidden_states))
    return all(torch.equal(_bytes(a.to(dtype or a.dtype)), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
