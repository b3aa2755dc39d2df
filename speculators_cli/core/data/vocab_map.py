"""VocabMap: the verifier tokens in the draft vocabulary."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.data.map_file import HINT, read_map
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import replacing
from speculators_cli.core.reading import refusing


@dataclass(frozen=True)
class VocabMap:
    """The draft vocabulary, as the two maps that vLLM reads."""

    d2t: Tensor  # [draft_vocab], int64: verifier id = draft id + d2t[draft id]
    t2d: Tensor  # whether the draft has this verifier token

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the verifier."""
        return len(self.t2d)

    @property
    def draft_vocab_size(self) -> int:
        """Vocabulary size of the draft."""
        return len(self.d2t)

    @property
    def is_full(self) -> bool:
        """Whether the draft has every token of the verifier."""
        return self.draft_vocab_size == self.vocab_size

    @cached_property
    def kept_ids(self) -> Tensor:
        """Return the verifier id of each draft token; [draft_vocab], int64, ascending."""
        return self.d2t + torch.arange(self.draft_vocab_size, device=self.d2t.device)

    def measure_coverage(
        self,
        counts: NDArray[np.int64],  # [vocab]: how often each verifier token is counted
    ) -> float:
        """Return the fraction of the counted tokens within the draft vocabulary."""
        return float(counts[self.t2d.numpy()].sum() / counts.sum())

    @cached_property
    def hash(self) -> str:
        """Return a hash of the vocabulary."""
        return sha256(self.t2d.numpy().tobytes()).hexdigest()

    @classmethod
    def full(cls, vocab_size: int) -> "VocabMap":
        """Build the map of the verifier's whole vocabulary."""
        return cls(torch.zeros(vocab_size, dtype=torch.int64), torch.ones(vocab_size).bool())

    @classmethod
    def choose(
        cls,
        counts: NDArray[np.int64],  # [vocab]: how often each verifier token is supervised
        draft_vocab_size: int,
        *,
        always: Collection[int] = (),
    ) -> "VocabMap":
        """Keep the most frequent tokens, ties to the lower id, and those in `always`.

        Raises:
            SettingsError: There are fewer tokens than that, or more in `always`.
        """
        if not len(always) <= draft_vocab_size <= len(counts):
            raise SettingsError(
                f"`--draft-vocab-size` must be from {len(always):,}, the tokens that are always "
                f"kept, to {len(counts):,}, those of the verifier, got `{draft_vocab_size}`",
                hint="Choose a size in that range, such as a quarter of the verifier's",
            )
        ranking = counts.astype(np.int64)  # as float64, large counts would tie
        ranking[list(always)] = np.iinfo(np.int64).max
        # Stable: equal counts, including zeros, stay in the order of their ids.
        kept = np.sort(np.argsort(-ranking, kind="stable")[:draft_vocab_size])
        t2d = np.zeros(len(counts), dtype=np.bool_)
        t2d[kept] = True
        return cls(torch.from_numpy(kept - np.arange(len(kept))), torch.from_numpy(t2d))

    def save(self, d2t_file: Path, t2d_file: Path) -> None:
        """Write both maps, each atomically."""
        for tensor, file in ((self.d2t, d2t_file), (self.t2d, t2d_file)):
            content = BytesIO()
            np.save(content, tensor.numpy())
            # Not by NumPy itself, which writes half a file to a full disk without an error.
            with replacing(file) as temporary:
                temporary.write_bytes(content.getvalue())

    @classmethod
    def load(cls, d2t_file: Path, t2d_file: Path) -> "VocabMap":
        """Read both maps and check that they are consistent.

        Raises:
            SettingsError: A map cannot be read, or they are inconsistent.
        """
        with refusing(SettingsError):
            d2t, t2d = read_map(d2t_file, "d2t"), read_map(t2d_file, "t2d")
        kept = find_kept(d2t, t2d)
        if kept is None:
            raise SettingsError(_describe_misfit(d2t, t2d, d2t_file, t2d_file), hint=HINT)
        return cls(torch.from_numpy(kept - np.arange(len(kept))), torch.from_numpy(t2d > 0))

    def check(self, vocab_size: int) -> None:
        """Check that the maps are for a verifier with this many embedding rows.

        Raises:
            SettingsError: They are not.
        """
        if self.vocab_size != vocab_size:
            raise SettingsError(
                f"`--t2d-path` covers {self.vocab_size:,} tokens, the verifier has {vocab_size:,}",
                hint=HINT,
            )


def find_kept(
    d2t: NDArray[np.int64],  # [draft_vocab]: offsets
    t2d: NDArray[np.int64],  # [vocab]: 1 where the draft vocabulary has the token
) -> NDArray[np.int64] | None:
    """Return the verifier ids that both maps keep, ascending; None if they are inconsistent.

    Other tools order draft tokens by frequency. A fresh draft has no weights that depend on the
    order, so its ids are in ascending order.
    """
    kept = np.sort(d2t + np.arange(len(d2t)))
    is_mask = bool(np.isin(t2d, (0, 1)).all())
    return kept if len(kept) and is_mask and np.array_equal(np.flatnonzero(t2d), kept) else None


def _describe_misfit(
    d2t: NDArray[np.int64], t2d: NDArray[np.int64], d2t_file: Path, t2d_file: Path
) -> str:
    """Describe why two maps are inconsistent, by the most likely mistake."""
    if find_kept(t2d, d2t) is not None:
        return f"`{d2t_file}` is the target-to-draft map and `{t2d_file}` the other: swap them"
    if find_kept(d2t - np.arange(len(d2t)), t2d) is not None:
        return (
            f"`{d2t_file}` has verifier ids, expected offsets: the verifier id of draft token i, "
            "minus i"
        )
    if not np.isin(t2d, (0, 1)).all():
        return f"`{t2d_file}` has values other than 0 and 1"
    if not len(d2t):
        return f"`{d2t_file}` has no tokens"
    kept = d2t + np.arange(len(d2t))
    if kept.min() < 0 or kept.max() >= len(t2d):
        return (
            f"`{d2t_file}` has verifier ids from {kept.min():,} to {kept.max():,}, expected ones "
            f"below the {len(t2d):,} of `{t2d_file}`"
        )
    ids, counts = np.unique(kept, return_counts=True)
    if (counts > 1).any():
        return f"`{d2t_file}` has the verifier id {ids[counts > 1][0]:,} more than once"
    return (
        f"`{d2t_file}` ({len(d2t):,} tokens) and `{t2d_file}` ({int(t2d.sum()):,} of "
        f"{len(t2d):,} tokens) do not keep the same tokens"
    )
