"""What the predictions of a block weigh in the loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Fixed decay, or weights that depend on the draft's own probabilities (D-PACE)."""

    gamma: float | None  # of the decay
    alpha: float | None = None  # of D-PACE

    def of_predictions(self, num_predictions: int) -> tuple[float, ...]:
        """Weight of each prediction, the same for all blocks."""
        if self.gamma is None:
            return (1.0,) * num_predictions
        return tuple(math.exp(-k / self.gamma) for k in range(num_predictions))


@torch.no_grad()
def weigh_by_acceptance(
    cross_entropy: Tensor,  # [anchors, predictions], float32
    scored: Tensor,  # [anchors, predictions], bool
    alpha: float,
) -> Tensor:
    r"""Compute the weights of D-PACE (arXiv 2605.18810); [anchors, predictions], float32.

    With smoothed probabilities :math:`q_i = (1 - \alpha) e^{-CE_i} + \alpha`, the expected length
    of an accepted prefix is :math:`\sum_m \prod_{i \le m} q_i`. The weight of a prediction is its
    derivative by :math:`\log q_s`, :math:`w_s = \sum_{m \ge s} \prod_{i \le m} q_i`.
    """
    smoothed = (1.0 - alpha) * (-cross_entropy).exp() + alpha
    prefixes = smoothed.where(scored, 1.0).cumprod(-1) * scored
    return prefixes.flip(-1).cumsum(-1).flip(-1)
