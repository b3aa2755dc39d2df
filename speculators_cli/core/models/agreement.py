"""Agreement of samples with a verifier: top-1 accuracy of its LM head on their hidden states."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.supervised_rows import held_tokens
from speculators_cli.core.models.verifier import FrozenVerifier

MAX_POSITIONS = 64  # of each sample, at most, that the accuracy is measured on
ROWS_AT_ONCE = 256  # each needs a row of logits over the whole vocabulary
# A lower top-1 accuracy means other hidden states, however the tokens were sampled.
MIN_ACCURACY = 0.05
# The norm does not reorder the values of a token, so a real difference is large.
CLEAR_MARGIN = 0.1
NUM_SCALE_POSITIONS = 8  # positions of a sample whose scale is compared with that of normed states
SCALE_ERROR = 0.05  # relative, for a normed state: 8-bit types round each value by up to 6 %
NUM_CONFIRMING = 16  # samples
MIN_CONFIRMED = 8  # positions, where the scale of the states contradicts `is_normed` as well


@dataclass(frozen=True)
class Agreement:
    """Top-1 accuracy of the verifier's LM head on the last hidden states of samples."""

    with_norm: float  # with the final norm applied first
    without_norm: float
    is_marked_normed: bool  # `is_normed` of the samples
    num_positions: int

    @property
    def is_mark_wrong(self) -> bool:
        """Whether the states clearly contradict `is_normed` of the samples."""
        marked, other = self._marked_and_other
        return other >= MIN_ACCURACY and other > marked + CLEAR_MARGIN

    @property
    def confirms_scale(self) -> bool:
        """Whether the accuracy is consistent with a scale that contradicts `is_normed`.

        Where the norm weights are uniform, the norm hardly changes the top-1 token, only the
        distribution: states marked as normed need not be predicted better with the norm. Divided by
        uniform weights, states have the scale of normed ones: those marked as not normed must be.
        """
        marked, other = self._marked_and_other
        return other >= MIN_ACCURACY and (
            other > marked or (self.is_marked_normed and other == marked)
        )

    @property
    def _marked_and_other(self) -> tuple[float, float]:
        marked, other = self.without_norm, self.with_norm
        return (marked, other) if self.is_marked_normed else (other, marked)

    @property
    def shares(self) -> str:
        """Both accuracies, formatted."""
        return f"{self.with_norm:.1%} with the final norm, {self.without_norm:.1%} without"

    @property
    def problem(self) -> str | None:
        """What contradicts the samples, or None; completes a sentence about them."""
        shares = self.shares
        if max(self.with_norm, self.without_norm) < MIN_ACCURACY:
            return f"does not match this verifier, or is misaligned: top-1 accuracy {shares}"
        if self.is_mark_wrong:
            wrong = "after" if self.is_marked_normed else "before"
            return (
                f"has last hidden states marked as {wrong} the final norm: top-1 accuracy {shares}"
            )
        return None


def spread(
    positions: Tensor,  # [positions], int64
    most: int = MAX_POSITIONS,
) -> Tensor:
    """Select at most `most` positions, evenly spaced."""
    keep = torch.linspace(0, len(positions) - 1, min(len(positions), most)).long()
    return positions[keep]


def find_scored(sample: Sample) -> Tensor:
    """Return the tokens before a supervised one whose last hidden states exist; [tokens], int64.

    The token before an answer is missing where last hidden states are held at supervised tokens.
    """
    return (sample.loss_mask[1:] & held_tokens(sample.last_hidden_states)[:-1]).nonzero().flatten()


@torch.no_grad()
def measure_agreement(verifier: FrozenVerifier, samples: Iterable[Sample]) -> Agreement | None:
    """Measure the top-1 accuracy of the verifier's LM head on the next tokens of samples.

    Measured at the supervised next tokens of a sample, or at all if it has none, where last hidden
    states exist. `is_normed` of the result is that of most positions.

    Returns:
        None if the samples have no next tokens.
    """
    states: list[Tensor] = []
    wanted: list[Tensor] = []
    num_normed = 0
    for sample in samples:
        positions = find_scored(sample)
        if not len(positions):
            positions = held_tokens(sample.last_hidden_states)[:-1].nonzero().flatten()
        positions = spread(positions)
        states.append(sample.last_hidden_states[positions].float())
        wanted.append(sample.input_ids[positions + 1])
        num_normed += sample.is_normed * len(positions)
    if not sum(map(len, wanted)):
        return None
    device = verifier.head.device
    inputs, expected = torch.cat(states).to(device), torch.cat(wanted).to(device)
    shares = []
    for skip_norm in (False, True):
        skip = torch.full((len(inputs),), skip_norm, device=device)
        tokens = verifier.tokens(verifier.normed(inputs, skip), rows_at_once=ROWS_AT_ONCE)
        shares.append(float((tokens == expected).float().mean()))
    is_normed = 2 * num_normed > len(expected)
    return Agreement(shares[0], shares[1], is_normed, len(expected))


@dataclass(frozen=True)
class WrongMarks:
    """Samples whose last hidden states contradict their `is_normed`."""

    indices: tuple[int, ...]
    agreement: Agreement  # measured on some of them

    @property
    def problem(self) -> str:
        """What is wrong with each sample; completes a sentence about it."""
        wrong, right = (
            ("after", "before") if self.agreement.is_marked_normed else ("before", "after")
        )
        return (
            f"has last hidden states marked as {wrong} the final norm but the scale of "
            f"states {right} it: top-1 accuracy {self.agreement.shares}"
        )


def find_wrong_marks(
    verifier: FrozenVerifier, samples: Sequence[Callable[[], Sample]]
) -> list[WrongMarks]:
    """Find samples whose `is_normed` contradicts both the scale of their states and the LM head.

    Every sample's scale is checked; the accuracy is measured on a few of those that it contradicts.
    """
    contradicted: dict[bool, list[int]] = {False: [], True: []}
    for index, read in enumerate(samples):
        sample = read()
        if looks_normed(verifier, sample) is (not sample.is_normed):
            contradicted[sample.is_normed].append(index)
    found = []
    for indices in contradicted.values():
        some = indices[:: -(-len(indices) // NUM_CONFIRMING) or 1]
        agreement = measure_agreement(verifier, (samples[i]() for i in some))
        if (
            agreement is not None
            and agreement.num_positions >= MIN_CONFIRMED
            and agreement.confirms_scale
        ):
            found.append(WrongMarks(tuple(indices), agreement))
    return found


@torch.no_grad()
def looks_normed(verifier: FrozenVerifier, sample: Sample) -> bool | None:
    """Whether last hidden states have the scale of normed ones; None if there are none.

    Divided by the norm weights, a normed state has a root mean square of one at every token.
    """
    rows = held_tokens(sample.last_hidden_states).nonzero().flatten()
    if not len(rows):
        return None
    rows = spread(rows, NUM_SCALE_POSITIONS)
    states = sample.last_hidden_states[rows].float()
    weight = verifier.norm_weight.to(states.device)
    if verifier.norm_bias is not None:
        states = states - verifier.norm_bias.to(states.device)
    used = weight != 0
    scale = (states[:, used] / weight[used]).pow(2).mean(-1).sqrt()
    return bool(((scale - 1).abs() < SCALE_ERROR).all())
