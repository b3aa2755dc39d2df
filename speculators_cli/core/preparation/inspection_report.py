"""What an inspection of samples found."""

from dataclasses import asdict, dataclass
from typing import Any

from speculators_cli.core.data.sample import Problem
from speculators_cli.core.models.agreement import Agreement


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
class InspectionReport:
    """A folder of samples; None is unknown. Sizes are those of most samples."""

    format: str  # `v0`, `v1`, `speculators`, `specforge` or `mixed`
    num_samples: int  # that can be read
    num_bytes: int
    tokens: Distribution
    supervised_tokens: Distribution
    supervised_fractions: tuple[int, ...]  # samples by share of supervised tokens, in ten bins
    coverage_by_size: dict[int, float]  # of supervised tokens, by so many most frequent ones
    hidden_size: int
    num_aux_layers: int
    dtypes: dict[str, int]  # samples of each type of hidden states
    is_normed: bool
    layer_ids: tuple[int, ...] | None  # as `data_config.json` says
    are_layer_ids_assumed: bool  # by who wrote `data_config.json`
    layer_ids_convention: str | None
    verifier: str | None  # as `data_config.json` says
    total_seq_len: int
    num_packed_sequences: int
    fill: float  # share of positions that hold a token
    tokens_per_second: float  # what the next two are told for
    epoch_seconds: float
    disk_bytes_per_second: float  # that an epoch reads
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
