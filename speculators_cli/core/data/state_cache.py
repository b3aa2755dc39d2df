"""StateCache: a bounded part of the samples, whose computed hidden states are kept on disk.

The samples are chosen before the run, by a hash: nothing is evicted, every epoch reads the same
ones, and the choice does not depend on the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from speculators_cli.core.data.formats.detect import read_again
from speculators_cli.core.data.sample import ChangedSampleError, Sample
from speculators_cli.core.data.verifier_input import CacheSlot

if TYPE_CHECKING:
    import torch

FILE_BYTES = 4096  # of a file beside its states, ids and mask
FORMAT = "v1"


@dataclass(frozen=True)
class StatesFormat:
    """Hidden states as the verifier computes and the cache stores them."""

    num_aux_layers: int
    hidden_size: int
    dtype: "torch.dtype"  # of the batches
    storage_dtype: Literal["bfloat16", "float8"] | None  # None: that of the batches

    def count_bytes(self, num_tokens: int, num_targets: int) -> int:
        """Size of the file of a sample."""
        sizes = {"float8": 1, "bfloat16": 2, None: self.dtype.itemsize}
        rows = num_tokens * self.num_aux_layers + num_targets
        scales = 4 * rows if self.storage_dtype == "float8" else 0
        states = rows * self.hidden_size * sizes[self.storage_dtype]
        return states + scales + 9 * num_tokens + FILE_BYTES


@dataclass(frozen=True)
class Candidate:
    """A sample that may be kept."""

    name: str
    fingerprint: str  # of ids and mask
    num_bytes: int


@dataclass(frozen=True)
class StateCache:
    """Files of the chosen samples.

    Args:
        folder: Of the cache; shared by runs.
        engine: Hash of everything that hidden states of given tokens depend on.
        chosen: Fingerprints of the samples that are kept.
        states: Their form.
    """

    folder: Path
    engine: str
    chosen: frozenset[str]
    states: StatesFormat

    def file(self, fingerprint: str, num_tokens: int) -> Path | None:
        """Return the file of a sample of which some tokens are used; None if it is not kept."""
        if fingerprint not in self.chosen:
            return None
        key = sha256(f"{fingerprint}/{num_tokens}".encode()).hexdigest()[:32]
        return self.folder / self.engine / key[:2] / f"{key}.pt"

    def read(self, file: Path, slot: CacheSlot) -> Sample | None:
        """Read a sample; None if it is not there yet.

        Raises:
            ChangedSampleError: It is damaged, or has other tokens.
        """
        if not file.exists():
            return None
        sample = read_again(file, FORMAT)
        is_same = np.array_equal(sample.input_ids.numpy(), slot.input_ids.numpy())
        if not is_same or not np.array_equal(sample.loss_mask.numpy(), slot.loss_mask.numpy()):
            raise ChangedSampleError(file, "has other tokens than the sample that it is kept for")
        return sample


def choose_cached(
    groups: Sequence[Iterable[Candidate]], *, seed: int, num_bytes: int | None
) -> frozenset[str]:
    """Choose the samples of lowest hash, of each group in turn, until the size is reached.

    Args:
        groups: Validation samples, then those to train on.
        seed: Of the choice.
        num_bytes: Size of all files; None: no limit.

    Returns:
        Their fingerprints.
    """
    chosen: set[str] = set()
    left = num_bytes
    for group in groups:
        ordered = sorted(group, key=lambda x: (_hash(seed, x), x.name))
        for candidate in ordered:
            if candidate.fingerprint in chosen:
                continue
            if left is not None and candidate.num_bytes > left:
                return frozenset(chosen)
            left = None if left is None else left - candidate.num_bytes
            chosen.add(candidate.fingerprint)
    return frozenset(chosen)


def _hash(seed: int, candidate: Candidate) -> bytes:
    return sha256(f"{seed}/{candidate.fingerprint}".encode()).digest()


def engine_key(fingerprint: Mapping[str, str], storage_dtype: str | None) -> str:
    """Return the name of the subfolder for hidden states of one engine."""
    parts = sorted({**fingerprint, "storage": str(storage_dtype)}.items())
    return sha256(repr(parts).encode()).hexdigest()[:16]
