"""Checks of hidden states: values that are not finite, and outliers in scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from speculators_cli.core.data.sample import ChangedSampleError, Sample, States
from speculators_cli.core.data.supervised_rows import held_states
from speculators_cli.core.progress import Progress

NO_SCALE = torch.tensor(torch.nan)
OUTLIER = 10.0  # times the median scale of a layer over the samples
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class StatesReport:
    """Scales and problems of the hidden states of some samples."""

    num_samples: int
    layer_rms: tuple[float, ...]  # median over the samples; the last layer last
    problems: tuple[tuple[int, str], ...]  # index of the sample, description


def check_states(samples: Sequence[Callable[[], Sample]], progress: Progress) -> StatesReport:
    """Read and check the hidden states of samples, one at a time."""
    problems: list[tuple[int, str]] = []
    scales: dict[int, Tensor] = {}
    with progress.task("Checking hidden states", len(samples)) as task:
        for index, read in enumerate(samples):
            task.advance()
            try:
                found, rms = check_sample(read())
            except ChangedSampleError as error:
                found, rms = [f"can no longer be read: {error.reason}"], []
            problems += [(index, problem) for problem in found]
            if not found:
                # The median, since the first token has a scale of thousands in many verifiers.
                # Without supervised tokens, a sample may have no last hidden states.
                scales[index] = torch.stack([r.median() if len(r) else NO_SCALE for r in rms])
    if not scales:
        return StatesReport(len(samples), (), tuple(problems))
    table = torch.stack(list(scales.values()))  # [samples, layers]
    usual = table.nanmedian(0).values
    for index, row in scales.items():
        ratio = row / usual.clamp(min=1e-12)
        for layer in ((ratio > OUTLIER) | (ratio < 1 / OUTLIER)).nonzero().flatten().tolist():
            factor = float(ratio[layer])
            problems.append((index, f"has layer {layer} at {factor:.2g} times its usual scale"))
    return StatesReport(len(samples), tuple(usual.nan_to_num(0.0).tolist()), tuple(problems))


def check_sample(sample: Sample) -> tuple[list[str], list[Tensor]]:
    """Return the problems of a sample's states, and the scale of each token in each layer."""
    layers = (*sample.aux_hidden_states, held_states(sample.last_hidden_states))
    rms = [root_mean_square(x) for x in layers]
    pairs = zip(layers, rms, strict=True)
    checked = [check_layer(states, r, layer) for layer, (states, r) in enumerate(pairs)]
    found = [problem for problem in checked if problem is not None]
    return found or find_equal_layers(sample.aux_hidden_states), rms


def find_equal_layers(layers: Sequence[States]) -> list[str]:
    """Find neighbouring layers with equal states, such as one layer captured under two ids."""
    return [
        f"has the same states in layers {i} and {i + 1}"
        for i, (low, high) in enumerate(pairwise(layers))
        # Comparing the first rows suffices nearly always, and avoids reading the rest.
        if low.dtype == high.dtype
        and all(map(torch.equal, low.split(ROWS_AT_ONCE), high.split(ROWS_AT_ONCE)))
    ]


def root_mean_square(
    states: States,  # [seq_len, hidden]
) -> Tensor:
    """Compute the RMS of each token; [seq_len], float32. Rows are cast to float32 in chunks."""
    parts = [torch.linalg.vector_norm(x.float(), dim=-1) for x in states.split(ROWS_AT_ONCE)]
    rms: Tensor = torch.cat(parts or [torch.empty(0)]) / states.shape[-1] ** 0.5
    return rms


def check_layer(
    states: States,  # [seq_len, hidden]
    rms: Tensor,  # [seq_len]
    layer: int,
) -> str | None:
    """Return the problem of a layer, which completes a sentence, or None."""
    # A value can be non-finite only if the mean of the squares is.
    num_broken = int((~states[~rms.isfinite()].isfinite()).sum())
    if num_broken:
        return f"has {num_broken:,} non-finite values in layer {layer}"
    if len(rms) and not rms.any():
        return f"has only zeros in layer {layer}"
    first = states[:1]
    is_constant = len(rms) > 1 and bool((rms == rms[0]).all())
    if is_constant and all(bool((x == first).all()) for x in states.split(ROWS_AT_ONCE)):
        return f"has the same states at every token in layer {layer}"
    return None
