"""The result of an inspection of samples."""

from dataclasses import asdict, dataclass
from typing import Any

from speculators_cli.core.data.sample import Problem
from speculators_cli.core.models.agreement import Agreement


@dataclass(frozen=True)
class Distribution:
    """Distribution of a count over the samples."""

    min: int
    median: float
    p95: float
    max: int
    total: int
    histogram: tuple[int, ...]  # ten bins from minimum to maximum


@dataclass(frozen=True)
class InspectionReport:
    """A folder of samples; None means unknown. Sizes are those of most samples."""

    format: str  # `v0`, `v1`, `speculators`, `specforge` or `mixed`
    num_samples: int  # readable ones
    num_bytes: int
    tokens: Distribution
    supervised_tokens: Distribution
    supervised_fractions: tuple[
        int, ...
    ]  # number of samples by fraction of supervised tokens, in ten bins
    coverage_by_size: dict[
        int, float
    ]  # fraction of supervised tokens, by number of most frequent token ids
    hidden_size: int
    num_aux_layers: int
    dtypes: dict[str, int]  # number of samples by dtype of the hidden states
    is_normed: bool
    layer_ids: tuple[int, ...] | None  # from `data_config.json`
    are_layer_ids_assumed: bool  # from `data_config.json`
    layer_ids_convention: str | None
    verifier: str | None  # from `data_config.json`
    total_seq_len: int
    num_packed_sequences: int
    fill: float  # fraction of positions that are tokens
    tokens_per_second: float  # throughput assumed for the epoch estimates
    epoch_seconds: float
    disk_bytes_per_second: float  # read from disk during an epoch
    num_samples_looked_at: int
    layer_rms: tuple[float, ...]  # root mean square of each layer, the last layer last
    agreement: Agreement | None
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with paths as strings."""
        problems = [{"file": str(p.file), "problem": p.problem} for p in self.problems]
        return {
            **asdict(self),
            "num_tokens": self.tokens.total,
            "num_supervised_tokens": self.supervised_tokens.total,
            "problems": problems,
        }
