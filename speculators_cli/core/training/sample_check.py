"""Checks a few samples against the verifier's LM head, before the first step."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.source import SampleSource, spread_evenly
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.errors import DataError, MachineError
from speculators_cli.core.models.agreement import find_wrong_marks, measure_agreement
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.progress import Progress

NUM_LOOKED_AT = 128  # samples whose scale is compared with their mark
NUM_ASKED = 32  # samples checked against the LM head, over all groups
MAX_ASKED = 8  # of one group
MIN_ASKED = 2
MAX_GROUPS = 32
MIN_POSITIONS = 64  # fewer are inconclusive


def check_samples(
    samples: SampleSource, verifier: FrozenVerifier, *, folder: Path, progress: Progress
) -> None:
    """Check a few samples against the verifier's LM head, with and without its final norm.

    Each folder and each value of the mark is checked separately, from a few samples. The scale of
    the hidden states shows, for more samples, whether single ones are marked incorrectly. All ranks
    check the same samples, so that either all continue or none does.

    Args:
        samples: To train on.
        verifier: Its frozen parts.
        folder: Of the samples, for messages.
        progress: Reports problems that are only likely.

    Raises:
        DataError: The last hidden states are normed but marked as not normed, or the reverse:
            training would learn the wrong distribution.
    """
    groups = _group(samples)
    num_asked = min(MAX_ASKED, max(MIN_ASKED, NUM_ASKED // len(groups)))
    for ids in groups:
        shown = samples.path(ids[0]).parent if len(groups) > 1 else folder
        _check_group(samples, _spread(ids, num_asked), verifier, shown, progress)
    per_group = max(MIN_ASKED, NUM_LOOKED_AT // len(groups))
    looked_at = [i for ids in groups for i in _spread(ids, per_group)]
    for wrong in find_wrong_marks(verifier, _readers(samples, looked_at)):
        files = [samples.path(looked_at[i]) for i in wrong.indices]
        raise DataError(
            f"{len(files):,} of {len(looked_at):,} samples checked in `{folder}` are marked "
            f"incorrectly, such as `{files[0]}`: each {wrong.problem}",
            hint=f"{_hint(folder)}, and capture or mark these again; or pass `--no-check-samples` "
            "to train on them as they are marked",
        )


def check_captured(
    packed: Packed, states: CapturedStates, verifier: FrozenVerifier, progress: Progress
) -> None:
    """Check captured last hidden states by the LM head, where the engine's own logits are unknown.

    Args:
        packed: Documents, whose last hidden states are those of supervised tokens.
        states: Of the documents.
        verifier: Frozen parts that the draft reads.
        progress: Reports states that predict hardly any token, which may also be due to the data.

    Raises:
        MachineError: They are after the final norm: training would learn the wrong distribution.
    """
    mask = torch.zeros(len(packed.input_ids), dtype=torch.bool)
    mask[packed.rows] = True
    lengths = list(packed.lengths)
    masks = mask.split(lengths)
    last = states.last.cpu().split([int(own.sum()) for own in masks])
    documents = zip(packed.input_ids.split(lengths), masks, last, strict=True)
    agreement = measure_agreement(
        verifier,
        (
            Sample(ids, own, (), SupervisedRows(held, own), is_normed=False)
            for ids, own, held in documents
        ),
    )
    if agreement is None or agreement.num_positions < MIN_POSITIONS or agreement.problem is None:
        return
    if agreement.is_mark_wrong:
        raise MachineError(
            "The engine returns last hidden states after the verifier's final norm: top-1 accuracy "
            f"{agreement.shares}",
            hint="Pass another version of vLLM with `--vllm-python`, and report the verifier",
        )
    progress.warn(
        "The verifier's LM head predicts hardly any token from the hidden states that vLLM "
        f"computes: top-1 accuracy {agreement.shares}",
        hint="Check that the tokens are of this verifier, and compare with "
        "`--capture-engine transformers`",
    )


def _group(samples: SampleSource) -> list[list[int]]:
    """Ids of samples that are not empty, by folder and mark; a subset if there are many."""
    groups: defaultdict[tuple[Path, bool], list[int]] = defaultdict(list)
    for i in np.flatnonzero(samples.lengths).tolist():
        groups[samples.path(i).parent, samples.headers[i].is_normed].append(i)
    found = list(groups.values())
    return [found[i] for i in spread_evenly(len(found), MAX_GROUPS)]


def _check_group(
    samples: SampleSource,
    ids: Sequence[int],
    verifier: FrozenVerifier,
    folder: Path,
    progress: Progress,
) -> None:
    agreement = measure_agreement(verifier, (read() for read in _readers(samples, ids)))
    if agreement is None or agreement.num_positions < MIN_POSITIONS or agreement.problem is None:
        return
    if agreement.is_mark_wrong:
        raise DataError(
            f"`{folder}` {agreement.problem}",
            hint=f"{_hint(folder)}, or pass `--no-check-samples` to train on them as they are "
            "marked",
        )
    progress.warn(f"`{folder}` {agreement.problem}", hint=_hint(folder))


def _hint(folder: Path) -> str:
    return f"Run `speculators inspect-data {folder} --verifier-name-or-path ...` for details"


def _spread(ids: Sequence[int], most: int) -> list[int]:
    return [ids[i] for i in spread_evenly(len(ids), most)]


def _readers(samples: SampleSource, ids: Sequence[int]) -> list[Callable[[], Sample]]:
    """Readers of samples, so that one at a time is in memory."""
    return [partial(samples.read, i) for i in ids]
