"""Cost model of a DSpark training step: that of DFlash, with its own heads."""

from speculators_cli.core.algorithms.dflash.cost import BlockCost, BlockCounts
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.settings.algorithms.dspark import DSparkSettings


class DSparkCost(BlockCost[DSparkConfig, DSparkSettings]):
    """The cost of a DSpark step."""

    def count_own_products(self, config: DSparkConfig, counts: BlockCounts) -> float:
        """The bias of the Markov head, forward and twice backward, at each prediction."""
        return 3.0 * config.draft_vocab_size * config.markov_rank * counts.num_scored
