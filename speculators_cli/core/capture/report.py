"""GenerationReport: what `generate-data` has made."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StageTime:
    """One stage of this run; what earlier runs had done is not counted."""

    num_tokens: int  # over all ranks
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput over all ranks; None if nothing was left to do."""
        return self.num_tokens / self.seconds if self.num_tokens and self.seconds else None


@dataclass(frozen=True)
class GenerationReport:
    """Counts over the whole output folder, and times of this run."""

    output_dir: Path
    verifier: str
    layer_ids: tuple[int, ...]
    num_conversations: int  # rows of the input
    num_bad_rows: int
    bad_rows: tuple[str, ...]  # the first ones, with the reason
    num_rows: int  # of tokens; each becomes a sample
    num_tokens: int
    num_supervised_tokens: int
    num_truncated_answers: int  # without an end token
    num_truncated_rows: int  # that lost supervised tokens at the maximum length
    left_out: dict[str, int] = field(default_factory=dict)  # answers, by reason
    num_samples: int | None = None  # None: tokens only
    num_non_finite: int = 0  # samples left out since a hidden state is NaN or Inf
    head_agreement: float | None = None  # of the first sequence with the verifier's own tokens
    num_bytes: int = 0
    tokens_time: StageTime = StageTime(0, 0.0)
    states_time: StageTime = StageTime(0, 0.0)

    @property
    def supervised_share(self) -> float:
        """Fraction of tokens that are supervised."""
        return self.num_supervised_tokens / max(self.num_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        content = asdict(self) | {
            "output_dir": str(self.output_dir),
            "supervised_share": self.supervised_share,
        }
        for stage in ("tokens", "states"):
            time: StageTime = getattr(self, f"{stage}_time")
            del content[f"{stage}_time"]
            content[f"{stage}_seconds"] = time.seconds
            content[f"{stage}_tokens_per_second"] = time.tokens_per_second
        return content
