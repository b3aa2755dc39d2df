"""Whether the verifier's head, on the last hidden states of samples, predicts their next tokens."""

from collections.abc import Iterable
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
        marked, other = self.without_norm, self.with_norm
        if not self.is_marked_normed:
            marked, other = other, marked
        return other >= LITTLE and other > marked + CLEARLY

    @property
    def problem(self) -> str | None:
        """What contradicts the samples, if anything does; the end of a sentence about them."""
        shares = f"{self.with_norm:.1%} with the final norm, {self.without_norm:.1%} without"
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

    Asked where the next token is supervised, else anywhere; the mark is that of the last sample.

    Returns:
        None if there is no position to ask about.
    """
    states: list[Tensor] = []
    wanted: list[Tensor] = []
    is_normed = False
    for sample in samples:
        positions = sample.loss_mask[1:].nonzero().flatten()
        if not len(positions):
            positions = torch.arange(sample.num_tokens - 1)
        positions = spread(positions)
        states.append(sample.last_hidden_states[positions].float())
        wanted.append(sample.input_ids[positions + 1])
        is_normed = sample.is_normed
    if not sum(map(len, wanted)):
        return None
    device = verifier.head.device
    asked, expected = torch.cat(states).to(device), torch.cat(wanted).to(device)
    shares = []
    for skip_norm in (False, True):
        skip = torch.full((len(asked),), skip_norm, device=device)
        tokens = verifier.tokens(verifier.normed(asked, skip), rows_at_once=ROWS_AT_ONCE)
        shares.append(float((tokens == expected).float().mean()))
    return Agreement(shares[0], shares[1], is_normed, len(expected))
