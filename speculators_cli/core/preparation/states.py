"""What hidden states give away: values that are not finite, scales, and whose they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.data.sample import BadSampleError, Sample
from speculators_cli.core.models.verifier import VerifierConfig, load_frozen_verifier
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.preparation.inspection_report import Agreement
from speculators_cli.core.progress import Progress

OUTLIER = 10.0  # times the median scale of a layer over the samples
ROWS_AT_ONCE = 64
POSITIONS = 64  # of each sample, at most, that the verifier's head is asked about


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
                sample = read()
            except (BadSampleError, OSError):
                continue  # said by the scan
            layers = (*sample.aux_hidden_states, sample.last_hidden_states)
            rms = [root_mean_square(x) for x in layers]
            pairs = zip(layers, rms, strict=True)
            checked = [check_layer(states, r, layer) for layer, (states, r) in enumerate(pairs)]
            found = [problem for problem in checked if problem is not None]
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


def root_mean_square(
    states: Tensor,  # [seq_len, hidden]
) -> Tensor:
    """Of each token; [seq_len], float32. Rows are taken a few at a time: each is cast in memory."""
    parts = [torch.linalg.vector_norm(x.float(), dim=-1) for x in states.split(ROWS_AT_ONCE)]
    rms: Tensor = torch.cat(parts) / states.shape[-1] ** 0.5
    return rms


def check_layer(
    states: Tensor,  # [seq_len, hidden]
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
    if len(rms) > 1 and bool((rms == rms[0]).all()) and bool((states == states[:1]).all()):
        return f"has the same states at every token in layer {layer}"
    return None


def spread(
    positions: Tensor,  # [positions], int64
) -> Tensor:
    """`POSITIONS` of them at most, evenly spread."""
    keep = torch.linspace(0, len(positions) - 1, min(len(positions), POSITIONS)).long()
    return positions[keep]


@torch.no_grad()
def measure_agreement(
    files: VerifierFiles,
    config: VerifierConfig,
    samples: Sequence[Callable[[], Sample]],
    progress: Progress,
) -> Agreement | None:
    """How often the verifier's head on a token's last hidden states has the next token first.

    Returns:
        None if there is no sample to ask about.
    """
    if not samples:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verifier = load_frozen_verifier(files, config).to(device)
    num_right = torch.zeros(2, dtype=torch.int64)  # with the norm, without
    num_positions, is_normed = 0, False
    with progress.task("Asking the verifier", len(samples)) as task:
        for read in samples:
            sample = read()
            positions = sample.loss_mask[1:].nonzero().flatten()
            if not len(positions):
                positions = torch.arange(sample.num_tokens - 1)
            positions = spread(positions)
            states = sample.last_hidden_states[positions].float().to(device)
            wanted = sample.input_ids[positions + 1].to(device)
            for index, skip_norm in enumerate((False, True)):
                skip = torch.full((len(states),), skip_norm, device=device)
                right = verifier.tokens(verifier.normed(states, skip)) == wanted
                num_right[index] += int(right.sum())
            num_positions += len(positions)
            is_normed = sample.is_normed
            task.advance()
    with_norm, without_norm = (num_right / max(num_positions, 1)).tolist()
    return Agreement(with_norm, without_norm, is_normed, num_positions)
