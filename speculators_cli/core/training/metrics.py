"""What a run measures: sums over positions, reduced once over ranks, divided once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.models.ttt import StepSums
from speculators_cli.core.training.distributed import Ranks

Metrics = dict[str, float | None]  # None: nothing was counted


@dataclass
class MetricSums:
    """Adds up steps on the device until someone looks."""

    loss_weights: tuple[float, ...]
    steps: Tensor | None = None  # [6, steps], float64, as `StepSums.stacked`
    tokens: Tensor | None = None  # [2], int64: of documents, supervised

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Take in what one batch gave."""
        stacked = sums.stacked()
        self.steps = stacked if self.steps is None else self.steps + stacked
        counts = torch.stack([(batch.document_ids >= 0).sum(), batch.loss_mask.sum()])
        self.tokens = counts if self.tokens is None else self.tokens + counts

    def reduce(self, ranks: Ranks) -> Metrics:
        """Sum over ranks, then divide; waits for the device.

        Returns:
            `loss` and `loss_k` in nats per scored position, `full_acc_k`, `cond_acc_k`,
            `acceptance_rate_k`, `acceptance_length` (simulated), `tokens`, `supervised_fraction`;
            None where nothing was counted.
        """
        num_steps = len(self.loss_weights)
        steps = self.steps if self.steps is not None else torch.zeros(6, num_steps)
        tokens = self.tokens if self.tokens is not None else torch.zeros(2)
        flat = torch.cat([steps.double().flatten(), tokens.double()])
        *flat_steps, num_tokens, num_supervised = ranks.sum(flat).tolist()
        rows = [flat_steps[row * num_steps : (row + 1) * num_steps] for row in range(6)]
        losses = [_ratio(a, b) for a, b in zip(rows[0], rows[1], strict=True)]
        rates = [_ratio(a, b) for a, b in zip(rows[5], rows[3], strict=True)]
        weighted = [w * (x or 0.0) for w, x in zip(self.loss_weights, losses, strict=True)]
        metrics: Metrics = {"loss": sum(weighted) if rows[1][0] else None}
        for step in range(num_steps):
            metrics |= {
                f"loss_{step}": losses[step],
                f"full_acc_{step}": _ratio(rows[2][step], rows[1][step]),
                f"cond_acc_{step}": _ratio(rows[5][step], rows[4][step]),
                f"acceptance_rate_{step}": rates[step],
            }
        return metrics | {
            "acceptance_length": 1.0 + sum(rate or 0.0 for rate in rates) if rows[3][0] else None,
            "tokens": num_tokens,
            "supervised_fraction": _ratio(num_supervised, num_tokens),
        }


def are_finite(*values: float | None) -> bool:
    """Whether all of them are known and numbers."""
    return all(value is not None and math.isfinite(value) for value in values)


def _ratio(numerator: float, denominator: float) -> float | None:
    """The quotient, or None where nothing was counted."""
    return numerator / denominator if denominator else None
