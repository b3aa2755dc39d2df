"""What hidden states give away of themselves: values that are not finite, and odd scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from speculators_cli.core.data.sample import ChangedSampleError, Sample, States
from speculators_cli.core.progress import Progress

OUTLIER = 10.0  # times the median scale of a layer over the samples
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class StatesReport:
    """Hidden states of some samples."""

    num_samples: int
    layer_rms: tuple[float, ...]  # median over the samples; the last layer last
    problems: tuple[tuple[int, str], ...]  # index of the sample, what is wrong


def look_at_states(samples: Sequence[Callable[[], Sample]], progress: Progress) -> StatesReport:
    """Read the hidden states of samples, one at a time."""
    problems: list[tuple[int, str]] = []
    scales: dict[int, Tensor] = {}
    with progress.task("Looking at hidden states", len(samples)) as task:
        for index, read in enumerate(samples):
            task.advance()
            try:
                found, rms = look_at(read())
            except ChangedSampleError as error:
                found, rms = [f"can no longer be read: {error.reason}"], []
            problems += [(index, problem) for problem in found]
            if not found:
                # The median, since the first token carries thousands in many verifiers.
                scales[index] = torch.stack([r.median() for r in rms])
    if not scales:
        return StatesReport(len(samples), (), tuple(problems))
    table = torch.stack(list(scales.values()))  # [samples, layers]
    usual = table.median(0).values
    for index, row in scales.items():
        ratio = row / usual.clamp(min=1e-12)
        for layer in ((ratio > OUTLIER) | (ratio < 1 / OUTLIER)).nonzero().flatten().tolist():
            factor = float(ratio[layer])
            problems.append((index, f"has layer {layer} at {factor:.2g} times its usual scale"))
    return StatesReport(len(samples), tuple(usual.tolist()), tuple(problems))


def look_at(sample: Sample) -> tuple[list[str], list[Tensor]]:
    """What is wrong with the states of a sample, and the scale of each token in each layer."""
    layers = (*sample.aux_hidden_states, sample.last_hidden_states)
    rms = [root_mean_square(x) for x in layers]
    pairs = zip(layers, rms, strict=True)
    checked = [check_layer(states, r, layer) for layer, (states, r) in enumerate(pairs)]
    found = [problem for problem in checked if problem is not None]
    return found or find_equal_layers(sample.aux_hidden_states), rms


def find_equal_layers(layers: Sequence[States]) -> list[str]:
    """Neighbours that hold the same states: one layer captured twice, under two ids."""
    return [
        f"has the same states in layers {i} and {i + 1}"
        for i, (low, high) in enumerate(pairwise(layers))
        # The first rows differ nearly always, and the rest stays on disk.
        if low.dtype == high.dtype
        and all(map(torch.equal, low.split(ROWS_AT_ONCE), high.split(ROWS_AT_ONCE)))
    ]


def root_mean_square(
    states: States,  # [seq_len, hidden]
) -> Tensor:
    """Of each token; [seq_len], float32. Rows are taken a few at a time: each is cast in memory."""
    parts = [torch.linalg.vector_norm(x.float(), dim=-1) for x in states.split(ROWS_AT_ONCE)]
    rms: Tensor = torch.cat(parts) / states.shape[-1] ** 0.5
    return rms


def check_layer(
    states: States,  # [seq_len, hidden]
    rms: Tensor,  # [seq_len]
    layer: int,
) -> str | None:
    """What is wrong with a layer, as the end of a sentence."""
    # Only where the mean of the squares is not finite can a value be.
    num_broken = int((~states[~rms.isfinite()].isfinite()).sum())
    if num_broken:
        return f"has {num_broken:,} values that are not finite in layer {layer}"
    if not rms.any():
        return f"has only zeros in layer {layer}"
    first = states[:1]
    is_constant = len(rms) > 1 and bool((rms == rms[0]).all())
    if is_constant and all(bool((x == first).all()) for x in states.split(ROWS_AT_ONCE)):
        return f"has the same states at every token in layer {layer}"
    return None
