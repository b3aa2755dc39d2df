"""The embedded verifier in tests: a draft vocabulary that it does not need."""

from pathlib import Path

import numpy as np

from speculators_cli.core.data.vocab_map import VocabMap

VOCAB, DRAFT_VOCAB = 2048, 1500


def write_vocab_map(folder: Path) -> None:
    """Write `d2t.npy` and `t2d.npy` of a vocabulary drawn at random."""
    kept = np.sort(np.random.default_rng(0).permutation(VOCAB)[:DRAFT_VOCAB])
    counts = np.zeros(VOCAB, np.int64)
    counts[kept] = 1
    VocabMap.choose(counts, DRAFT_VOCAB).save(folder / "d2t.npy", folder / "t2d.npy")
