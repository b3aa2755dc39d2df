"""PromptEvaluation: the draft in training, evaluated on prompts by a function of the caller."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.best import EVALUATED
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.metrics import Metrics
from speculators_cli.core.training.snapshot import full_weights
from speculators_cli.core.training.weights import DraftWeights
from speculators_cli.settings.train import TrainSettings

# Drafts and verifies this rank's prompts; the accepted draft tokens of each verifier pass.
EvaluateDraft = Callable[[TrainedDraft], Sequence[int]]


class OpenEvaluation(Protocol):
    """Loads what an evaluation needs, on every rank."""

    def __call__(
        self, settings: TrainSettings, inputs: Inputs, ranks: Ranks, progress: Progress
    ) -> EvaluateDraft:
        """Return a function that evaluates a draft on this rank's prompts."""


@dataclass(frozen=True, eq=False)
class PromptEvaluation:
    """Evaluates the draft in training; the random state of the training is left as it is."""

    evaluate: EvaluateDraft
    weights: DraftWeights
    vocab_map: VocabMap
    ranks: Ranks

    @property
    def config(self) -> DraftConfig:
        """Of the draft."""
        return self.weights.draft.config

    def run(self) -> Metrics:
        """Acceptance length and rates over the prompts of all ranks. All ranks must call."""
        weights = {name: tensor.cpu() for name, tensor in full_weights(self.weights)}
        trained = TrainedDraft(
            name="the draft in training",
            kind="checkpoint",
            config=self.config,
            weights=weights,
            embedding=None,
            vocab_map=self.vocab_map,
            checkpoint=None,
            assumed={},
        )
        with keeping_random_state(self.ranks.device):
            num_accepted = self.evaluate(trained)
        counts = torch.bincount(
            torch.tensor(num_accepted, dtype=torch.int64),
            minlength=self.config.num_draft_tokens + 1,
        )
        return describe_passes(self.ranks.sum(counts))


def describe_passes(
    counts: Tensor,  # [draft tokens + 1], int64: passes by number of accepted draft tokens
) -> Metrics:
    """Acceptance length and rates of verifier passes; None if there were none."""
    num_passes = int(counts.sum())
    num_accepted = [int(counts[k + 1 :].sum()) for k in range(len(counts) - 1)]
    length = 1.0 + sum(num_accepted) / num_passes if num_passes else None
    rates = [count / num_passes if num_passes else None for count in num_accepted]
    return {
        EVALUATED: length,
        **{f"evaluated_acceptance_rate_{k}": rate for k, rate in enumerate(rates)},
        "evaluated_passes": num_passes,
    }


def keeping_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random state after the block: what is loaded in it may draw initial weights."""
    kept: AbstractContextManager[None] = torch.random.fork_rng(
        [device] if device.type == "cuda" else []
    )
    return kept


def check_patience(settings: TrainSettings, inputs: Inputs) -> None:
    """Check that epochs can be compared, if training stops without a better one.

    Raises:
        DataError: There is neither a validation nor an evaluation.
    """
    if settings.run.early_stopping_patience is None or len(inputs.validation_samples):
        return
    if settings.evaluation.evaluate_prompts is None:
        raise DataError(
            "`--early-stopping-patience` needs validation samples, and there are none",
            hint="Pass `--val-data-path`, `--evaluate-prompts`, or a lower `--train-data-ratio`",
        )
