"""Whether samples are what they say they are: asked of a few, before the first step."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from speculators_cli.core.data.dataset import Dataset, spread_evenly
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.errors import DataError
from speculators_cli.core.models.agreement import measure_agreement
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.progress import Progress

NUM_SAMPLES = 8
MIN_POSITIONS = 64  # fewer decide nothing


def check_samples(
    samples: Dataset, verifier: FrozenVerifier, *, folder: Path, progress: Progress
) -> None:
    """Ask the verifier's head whether it predicts the samples, with its final norm and without.

    All ranks ask about the same samples, so that all of them go on or none does.

    Args:
        samples: To train on.
        verifier: Its frozen parts.
        folder: Of the samples, for messages.
        progress: Who hears of what is only likely wrong.

    Raises:
        DataError: The last hidden states are normed where they are marked as not, or the reverse:
            training would learn the wrong distribution.
    """
    agreement = measure_agreement(verifier, _read_some(samples))
    if agreement is None or agreement.num_positions < MIN_POSITIONS or agreement.problem is None:
        return
    hint = f"Run `speculators inspect-data {folder} --verifier-name-or-path ...` to see more"
    if agreement.is_mark_wrong:
        raise DataError(
            f"`{folder}` {agreement.problem}",
            hint=f"{hint}, or pass `--no-check-samples` to train on them as they are marked",
        )
    progress.warn(f"`{folder}` {agreement.problem}", hint=hint)


def _read_some(samples: Dataset) -> Iterator[Sample]:
    """Some samples that have tokens to predict, evenly spread, one at a time in memory."""
    usable = np.flatnonzero(samples.lengths)
    for i in spread_evenly(len(usable), NUM_SAMPLES):
        yield samples.read(int(usable[i]))
