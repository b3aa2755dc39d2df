"""Cost model of a P-EAGLE training step: that of EAGLE-3, with the depths that are drawn."""

from speculators_cli.core.algorithms.eagle3.cost import EagleCost, RowCounts, count_attention
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.settings.algorithms.peagle import PEagleSettings

# Time of attention per operation, in that of matrix products: fitted to steps of Llama-3.1-8B's
# shape on an H200, with 5 and 8 TTT steps.
ATTENTION_SLOWDOWN = 2.7


class PEagleCost(EagleCost[PEagleConfig, PEagleSettings]):
    """The cost of a step whose masks are one row before the first layer's RoPE."""

    def count_passes(self, config: PEagleConfig, settings: PEagleSettings, num_active: int) -> int:
        """Passes of active rows through TTT steps: of all through the first, then of those kept."""
        kept = DepthSampling.of(settings).count_kept(num_active, config.ttt_steps)
        return num_active + sum(kept)

    def count_last(self, num_active: int, passes: int) -> int:
        """Of these passes, those through all steps after the first, which are computed at once."""
        return passes - num_active

    def count_spared_flops(self, config: PEagleConfig, num_later: int) -> float:
        """The first layer's queries, keys and values of the later steps."""
        return 2.0 * 3 * config.hidden_size * num_later * _projected(config)

    def count_other_flops(self, config: PEagleConfig, rows: RowCounts, passes: int) -> float:
        """Attention between rows that are kept: it computes all of a document's, and is slower."""
        pairs = config.ttt_steps * sum(rows.all_pairs)
        computed = 2.0 * 7 * pairs * config.num_heads * config.head_dim
        needed = count_attention(config, rows, passes / max(rows.num_active, 1))
        return ATTENTION_SLOWDOWN * computed - needed

    def count_spared_bytes(self, config: PEagleConfig, num_later: int) -> int:
        """Their inputs, and their keys and values before RoPE."""
        kv = 2 * config.num_kv_heads * config.head_dim
        return 2 * num_later * (config.hidden_size + kv)


def _projected(config: PEagleConfig) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
