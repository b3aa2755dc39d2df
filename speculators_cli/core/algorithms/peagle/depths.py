"""Which positions are trained at which depths: COD sampling (arXiv 2602.01469).

A depth is a TTT step. All positions are trained at depth 0, and fewer at each further one.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from speculators_cli.core.algorithms.objective import scored_on_host
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.noise import draw_numbers
from speculators_cli.settings.algorithms.peagle import PEagleSettings


@dataclass(frozen=True)
class DepthSampling:
    """How many positions are kept at each depth.

    Args:
        ratio: Depth d keeps this fraction to the power of d.
        ratio_min: And no smaller fraction than this one.
        num_anchors: Positions per packed sequence that are trained beyond depth 0, at most; None:
            all.
    """

    ratio: float = 1.0
    ratio_min: float = 0.0
    num_anchors: int | None = None

    @classmethod
    def of(cls, settings: PEagleSettings) -> Self:
        """The sampling of a run."""
        return cls(settings.down_sample_ratio, settings.down_sample_ratio_min, settings.num_anchors)

    def count_kept(self, num_positions: int, num_depths: int) -> list[int]:
        """How many of some positions are kept at each depth from 1 on."""
        if self.num_anchors is not None:
            num_positions = min(num_positions, self.num_anchors)
        shares = (max(self.ratio**depth, self.ratio_min) for depth in range(1, num_depths))
        return [round(share * num_positions) for share in shares]

    def draw(self, batch: Batch, num_depths: int, *, seed: int, epoch: int) -> Batch:
        """Draw the depths of each position of a batch.

        Every position has a random number that depends on the seed, the epoch and its sample only.
        Each depth keeps those with the smallest, so one that is kept at a depth is kept at all
        before it; ranks and resuming make no difference.
        """
        scored = scored_on_host(batch, num_depths).numpy()
        deeper = np.flatnonzero(scored[1:].any(axis=0))
        counts = self.count_kept(len(deeper), num_depths)
        if counts[-1] == len(deeper):
            return batch
        numbers = draw_numbers(batch, seed=seed, epoch=epoch, purpose="depths/")
        drawn = deeper[np.argsort(numbers[deeper], kind="stable")]
        for depth, count in enumerate(counts, 1):
            scored[depth, drawn[count:]] = False
        # Up to the last depth that is scored.
        depths = np.where(scored, np.arange(1, num_depths + 1)[:, None], 0).max(axis=0)
        return replace(batch, depths=torch.from_numpy(depths))
