"""The checkpoint's config.json: a P-EAGLE draft in the speculators format that vLLM reads."""

from dataclasses import dataclass
from typing import Any, ClassVar

from speculators_cli.core.algorithms.draft_config import MaskConfig
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config

MASK_HIDDEN = "mask_hidden"  # a tensor of the draft


@dataclass(frozen=True, kw_only=True)
class PEagleConfig(Eagle3Config, MaskConfig):
    """All values that determine the shape and computation of a P-EAGLE draft."""

    algorithm: ClassVar[str] = "peagle"

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json: what vLLM 0.32 reads, each value written out."""
        return super().to_json(dtype=dtype) | {"mask_token_id": self.mask_token_id}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as in a checkpoint."""
        width = self.num_aux_layers * self.target_hidden_size
        return super().tensor_shapes() | {MASK_HIDDEN: (1, 1, width)}
