"""Metrics of a run: sums over positions, reduced once over ranks, divided once."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import DraftModel, Ratio, StepSums
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.training.distributed import Ranks

Metrics = dict[str, float | None]  # None: nothing was counted


class MetricSums:
    """Accumulates counters on the device until they are reduced.

    Args:
        names: Of the counters, in their order.
        ratios: Pairs of counters to divide.
        loss_weights: Weight of each prediction in the loss.
    """

    def __init__(
        self, names: Sequence[str], ratios: Sequence[Ratio], loss_weights: Sequence[float]
    ) -> None:
        self.names, self.ratios, self.loss_weights = names, ratios, loss_weights
        self.counters: Tensor | None = None  # [counters, predictions], float64
        self.tokens: Tensor | None = None  # [2], int64: of documents, supervised

    @classmethod
    def of(cls, draft: DraftModel) -> Self:
        """Sums for the counters of a draft, still empty."""
        return cls(draft.counters, draft.ratios, draft.loss_weights)

    def add(self, sums: StepSums, batch: Batch) -> None:
        """Add the sums of one batch."""
        stacked = sums.stacked()
        self.counters = stacked if self.counters is None else self.counters + stacked
        counts = torch.stack([(batch.document_ids >= 0).sum(), batch.loss_mask.sum()])
        self.tokens = counts if self.tokens is None else self.tokens + counts

    def reduce(self, ranks: Ranks) -> Metrics:
        """Sum over ranks, then divide; waits for the device.

        Returns:
            `loss` (sum over predictions of weighted means per scored position), each ratio of the
            algorithm as `{metric}_{k}` for prediction k, `acceptance_length` (simulated), `tokens`,
            `supervised_fraction`; None where nothing was counted.
        """
        num_predictions = len(self.loss_weights)
        counters, tokens = self.counters, self.tokens
        if counters is None or tokens is None:
            counters, tokens = torch.zeros(len(self.names), num_predictions), torch.zeros(2)
        flat = torch.cat([counters.double().flatten(), tokens.double()])
        *values, num_tokens, num_supervised = ranks.sum(flat).tolist()
        rows = (values[i : i + num_predictions] for i in range(0, len(values), num_predictions))
        totals = dict(zip(self.names, rows, strict=True))
        ratios = {
            ratio.metric: [
                _divide(a, b)
                for a, b in zip(totals[ratio.numerator], totals[ratio.denominator], strict=True)
            ]
            for ratio in self.ratios
        }
        losses, rates = ratios["loss"], ratios.get("acceptance_rate")
        weighted = [w * (x or 0.0) for w, x in zip(self.loss_weights, losses, strict=True)]
        metrics: Metrics = {"loss": sum(weighted) if losses[0] is not None else None}
        for k in range(num_predictions):
            metrics |= {f"{name}_{k}": values[k] for name, values in ratios.items()}
        length = None
        if rates is not None and rates[0] is not None:
            length = 1.0 + sum(rate or 0.0 for rate in rates)
        return metrics | {
            "acceptance_length": length,
            "tokens": num_tokens,
            "supervised_fraction": _divide(num_supervised, num_tokens),
        }


def are_finite(*values: float | None) -> bool:
    """Whether all values are known and finite."""
    return all(value is not None and math.isfinite(value) for value in values)


def _divide(numerator: float, denominator: float) -> float | None:
    """The quotient, or None if nothing was counted."""
    return numerator / denominator if denominator else None
