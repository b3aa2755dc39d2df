"""Cost model of a DSpark training step: that of DFlash, with its own heads."""

from math import prod

from speculators_cli.core.algorithms.dflash.cost import BlockCost, BlockCounts
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.settings.algorithms.dspark import DSparkSettings


class DSparkCost(BlockCost[DSparkConfig, DSparkSettings]):
    """The cost of a DSpark step."""

    def count_own_products(self, config: DSparkConfig, counts: BlockCounts) -> float:
        """The heads, forward and twice backward, at each prediction."""
        weights = sum(
            prod(shape)
            for name, shape in config.tensor_shapes().items()
            if name.startswith(("markov_head.", "confidence_head.")) and "markov_w1" not in name
        )
        return 3.0 * weights * counts.num_scored
