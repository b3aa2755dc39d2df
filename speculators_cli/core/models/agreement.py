"""Whether the verifier's head, on the last hidden states of samples, predicts their next tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.data.sample import Sample
from speculators_cli.core.models.verifier import FrozenVerifier

POSITIONS = 64  # of each sample, at most, that the verifier's head is asked about
ROWS_AT_ONCE = 256  # each takes a row of logits over the whole vocabulary
# Agreement below this is no verifier's own output, whatever was sampled.
LITTLE = 0.05
# The norm changes nothing of the order within a token, so a real difference is large.
CLEARLY = 0.1
LOOKED_AT = 8  # positions of a sample whose scale is compared with the norm's
SCALE_ERROR = 0.05  # of a normed state: types of one byte round each value by up to 6 %
CONFIRMED_BY = 16  # samples
MIN_CONFIRMED = 8  # positions, where their scale contradicts the mark too


@dataclass(frozen=True)
class Agreement:
    """How often the verifier's head, on the last hidden states, has the next token first."""

    with_norm: float  # its final norm applied first
    without_norm: float
    is_marked_normed: bool  # what the samples say of their states
    num_positions: int

    @property
    def is_mark_wrong(self) -> bool:
        """Whether the states are the other kind than the samples say, beyond doubt."""
        marked, other = self._marked_and_other
        return other >= LITTLE and other > marked + CLEARLY

    @property
    def confirms_scale(self) -> bool:
        """Whether the head does not contradict a scale that denies the mark.

        Where the gain is even, the norm hardly changes which token is first, but the distribution:
        states marked as normed need not be predicted better with the norm. Of states with an even
        gain undone, the scale is that of normed ones: those marked as not normed must.
        """
        marked, other = self._marked_and_other
        return other >= LITTLE and (other > marked or (self.is_marked_normed and other == marked))

    @property
    def _marked_and_other(self) -> tuple[float, float]:
        marked, other = self.without_norm, self.with_norm
        return (marked, other) if self.is_marked_normed else (other, marked)

    @property
    def shares(self) -> str:
        """Both shares in words."""
        return f"{self.with_norm:.1%} with the final norm, {self.without_norm:.1%} without"

    @property
    def problem(self) -> str | None:
        """What contradicts the samples, if anything does; the end of a sentence about them."""
        shares = self.shares
        if max(self.with_norm, self.without_norm) < LITTLE:
            return f"is not of this verifier, or is shifted: its head is right at {shares}"
        if self.is_mark_wrong:
            wrong = "after" if self.is_marked_normed else "before"
            return f"has last hidden states marked as {wrong} the final norm; right at {shares}"
        return None


def spread(
    positions: Tensor,  # [positions], int64
) -> Tensor:
    """`POSITIONS` of them at most, evenly spread."""
    keep = torch.linspace(0, len(positions) - 1, min(len(positions), POSITIONS)).long()
    return positions[keep]


@torch.no_grad()
def measure_agreement(verifier: FrozenVerifier, samples: Iterable[Sample]) -> Agreement | None:
    """How often the verifier's head on a token's last hidden states has the next token first.

    Asked where the next token is supervised, else anywhere; the mark is that of most positions.

    Returns:
        None if there is no position to ask about.
    """
    states: list[Tensor] = []
    wanted: list[Tensor] = []
    num_normed = 0
    for sample in samples:
        positions = sample.loss_mask[1:].nonzero().flatten()
        if not len(positions):
            positions = torch.arange(sample.num_tokens - 1)
        positions = spread(positions)
        states.append(sample.last_hidden_states[positions].float())
        wanted.append(sample.input_ids[positions + 1])
        num_normed += sample.is_normed * len(positions)
    if not sum(map(len, wanted)):
        return None
    device = verifier.head.device
    asked, expected = torch.cat(states).to(device), torch.cat(wanted).to(device)
    shares = []
    for skip_norm in (False, True):
        skip = torch.full((len(asked),), skip_norm, device=device)
        tokens = verifier.tokens(verifier.normed(asked, skip), rows_at_once=ROWS_AT_ONCE)
        shares.append(float((tokens == expected).float().mean()))
    is_normed = 2 * num_normed > len(expected)
    return Agreement(shares[0], shares[1], is_normed, len(expected))


@dataclass(frozen=True)
class WrongMarks:
    """Samples whose last hidden states are the other kind than they are marked as."""

    indices: tuple[int, ...]
    agreement: Agreement  # of some of them

    @property
    def problem(self) -> str:
        """What is wrong with each; the end of a sentence about it."""
        wrong, right = (
            ("after", "before") if self.agreement.is_marked_normed else ("before", "after")
        )
        return (
            f"has last hidden states marked as {wrong} the final norm whose scale is that of "
            f"states {right} it; the head is right at {self.agreement.shares}"
        )


def find_wrong_marks(
    verifier: FrozenVerifier, samples: Sequence[Callable[[], Sample]]
) -> list[WrongMarks]:
    """Samples whose mark is contradicted by their scale, and by what the verifier's head predicts.

    The scale is looked at in each sample; the head is asked about a few of those it contradicts.
    """
    contradicted: dict[bool, list[int]] = {False: [], True: []}
    for index, read in enumerate(samples):
        sample = read()
        if looks_normed(verifier, sample) is not sample.is_normed:
            contradicted[sample.is_normed].append(index)
    found = []
    for indices in contradicted.values():
        some = indices[:: -(-len(indices) // CONFIRMED_BY) or 1]
        agreement = measure_agreement(verifier, (samples[i]() for i in some))
        if (
            agreement is not None
            and agreement.num_positions >= MIN_CONFIRMED
            and agreement.confirms_scale
        ):
            found.append(WrongMarks(tuple(indices), agreement))
    return found


@torch.no_grad()
def looks_normed(verifier: FrozenVerifier, sample: Sample) -> bool:
    """Whether last hidden states have the scale of normed ones.

    Divided by the gain of the norm, a normed state has a root mean square of one at every token.
    """
    rows = torch.linspace(0, sample.num_tokens - 1, min(sample.num_tokens, LOOKED_AT)).long()
    states = sample.last_hidden_states[rows].float()
    gain = verifier.norm_gain.to(states.device)
    bias = getattr(verifier, "norm_bias", None)
    if bias is not None:
        states = states - bias.to(states.device)
    used = gain != 0
    scale = (states[:, used] / gain[used]).pow(2).mean(-1).sqrt()
    return bool(((scale - 1).abs() < SCALE_ERROR).all())
