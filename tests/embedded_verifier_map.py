"""The embedded verifier in tests: drafts that fit it, a draft vocabulary that it does not need."""

from pathlib import Path
from typing import Any

import numpy as np

from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.demo.demo import VERIFIER_DIR

VOCAB, DRAFT_VOCAB = 2048, 1500
# Fields of a draft's config that fit the embedded verifier.
FOR_EMBEDDED: dict[str, Any] = {
    "hidden_size": 128,
    "target_hidden_size": 128,
    "vocab_size": VOCAB,
    "draft_vocab_size": 300,
    "target_layer_ids": (2, 4, 5),
    "verifier_name_or_path": str(VERIFIER_DIR),
}


def write_vocab_map(folder: Path) -> None:
    """Write `d2t.npy` and `t2d.npy` of a vocabulary drawn at random."""
    kept = np.sort(np.random.default_rng(0).permutation(VOCAB)[:DRAFT_VOCAB])
    counts = np.zeros(VOCAB, np.int64)
    counts[kept] = 1
    VocabMap.choose(counts, DRAFT_VOCAB).save(folder / "d2t.npy", folder / "t2d.npy")
