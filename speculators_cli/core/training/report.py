"""TrainReport: the result of a run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainReport:
    """The result of `speculators train`; None means unknown.

    A loss is the weighted sum over predictions of the mean loss per scored position, in nats.
    """

    checkpoint: Path | None
    best_checkpoint: Path | None
    best_epoch: int | None
    step: int
    total_steps: int
    epochs: int
    duration_seconds: float
    start_up_seconds: dict[str, float]  # by part; ends with the first log step
    save_wait_seconds: float  # of training, for checkpoints to be copied and written
    tokens_per_second: float
    capture_share: float | None  # of the time of steps; None if hidden states are stored
    peak_memory_bytes: int | None  # of the GPU, maximum over ranks
    validation_loss: float | None
    best_validation_loss: float | None
    acceptance_length: float | None  # simulated
    evaluated_acceptance_length: float | None  # on prompts
    best_evaluated_acceptance_length: float | None
    acceptance_rates: tuple[float, ...]  # of each prediction
    target_layer_ids: tuple[int, ...]
    are_layer_ids_assumed: bool  # a guess that was not confirmed
    num_skipped_steps: int
    num_bad_samples: int
    is_resumed: bool
    is_stopped_early: bool
    was_already_finished: bool
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """The fields, with paths as strings."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }
