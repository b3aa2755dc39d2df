"""What an inspection of samples found."""

from dataclasses import asdict, dataclass
from typing import Any

from speculators_cli.core.data.sample import Problem

# Agreement below this is no verifier's own output, whatever was sampled.
LITTLE = 0.05
# The norm changes nothing of the order within a token, so a real difference is large.
CLEARLY = 0.1


@dataclass(frozen=True)
class Distribution:
    """How a count is spread over the samples."""

    min: int
    median: float
    p95: float
    max: int
    total: int
    histogram: tuple[int, ...]  # ten bins from the least to the most


@dataclass(frozen=True)
class Agreement:
    """How often the verifier's head, on the last hidden states, has the next token first."""

    with_norm: float  # its final norm applied first
    without_norm: float
    is_marked_normed: bool  # what the samples say of their states
    num_positions: int

    @property
    def problem(self) -> str | None:
        """What contradicts the samples, if anything does."""
        marked, other = self.without_norm, self.with_norm
        if not self.is_marked_normed:
            marked, other = other, marked
        shares = f"{self.with_norm:.1%} with the final norm, {self.without_norm:.1%} without"
        if max(marked, other) < LITTLE:
            return f"is not of this verifier, or is shifted: its head is right at {shares}"
        if other > marked + CLEARLY:
            wrong = "after" if self.is_marked_normed else "before"
            return f"has last hidden states marked as {wrong} the final norm; right at {shares}"
        return None


@dataclass(frozen=True)
class InspectionReport:
    """A folder of samples; None is unknown. Sizes are those of most samples."""

    format: str  # `v0`, `v1` or `mixed`
    num_samples: int  # that can be read
    num_bytes: int
    tokens: Distribution
    supervised_tokens: Distribution
    hidden_size: int
    num_aux_layers: int
    dtypes: dict[str, int]  # samples of each type of hidden states
    is_normed: bool
    layer_ids: tuple[int, ...] | None  # as `data_config.json` says
    layer_ids_convention: str | None
    verifier: str | None  # as `data_config.json` says
    total_seq_len: int
    num_packed_sequences: int
    fill: float  # share of positions that hold a token
    num_samples_looked_at: int
    layer_rms: tuple[float, ...]  # root mean square of each layer, the last one last
    agreement: Agreement | None
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields, paths as text."""
        problems = [{"file": str(p.file), "problem": p.problem} for p in self.problems]
        return {
            **asdict(self),
            "num_tokens": self.tokens.total,
            "num_supervised_tokens": self.supervised_tokens.total,
            "problems": problems,
        }
