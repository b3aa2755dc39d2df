"""The checkpoint's config.json: a DSpark draft in the speculators format that vLLM reads."""

from dataclasses import dataclass
from typing import Any, ClassVar

from speculators_cli.core.algorithms.dflash.config import DFlashConfig


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(DFlashConfig):
    """All values that determine the shape and computation of a DSpark draft.

    Its blocks are those of DFlash, but every slot predicts the token after its own.
    """

    algorithm: ClassVar[str] = "dspark"
    first_slot: ClassVar[int] = 0

    markov_rank: int
    markov_head_type: str  # of `markov.MARKOV_HEADS`
    has_confidence: bool

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json: what vLLM 0.32 reads, each value written out."""
        content = super().to_json(dtype=dtype)
        # The engine derives it: windows are causal, full attention is not.
        del content["sliding_window_non_causal"]
        return content | {
            "sample_from_anchor": True,
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": self.has_confidence,
            "confidence_head_with_markov": self.has_confidence,
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as in a checkpoint."""
        rank, size = self.markov_rank, self.hidden_size
        shapes = super().tensor_shapes() | {
            "markov_head.markov_w1.weight": (self.vocab_size, rank),
            "markov_head.markov_w2.weight": (self.draft_vocab_size, rank),
        }
        if self.markov_head_type == "gated":
            shapes |= {
                "markov_head.gate_proj.weight": (rank, size + rank),
                "markov_head.gate_proj.bias": (rank,),
            }
        if self.markov_head_type == "rnn":
            shapes |= {
                "markov_head.joint_proj.weight": (3 * rank, 2 * rank + size),
                "markov_head.joint_proj.bias": (3 * rank,),
            }
        if self.has_confidence:
            shapes |= {
                "confidence_head.proj.weight": (1, size + rank),
                "confidence_head.proj.bias": (1,),
            }
        return shapes
