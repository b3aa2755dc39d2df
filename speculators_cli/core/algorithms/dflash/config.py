"""The checkpoint's config.json: a DFlash draft in the speculators format that vLLM reads."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from speculators_cli.core.algorithms.draft_config import MaskConfig
from speculators_cli.core.models.decoder_config import FULL, SLIDING


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(MaskConfig):
    """All values that determine the shape and computation of a DFlash draft."""

    algorithm: ClassVar[str] = "dflash"
    layer_ids_key: ClassVar[str] = "aux_hidden_state_layer_ids"

    block_size: int  # the anchor and the draft tokens
    draft_window: int | None = None  # tokens; None: full attention
    causal_block: bool = False

    first_slot: ClassVar[int] = 1  # of a block that predicts a token: its own

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that it was trained for: one for each slot of a block that predicts."""
        return self.block_size - self.first_slot

    def with_num_draft_tokens(self, num_draft_tokens: int) -> Self:
        """The same draft with blocks of another size, whose tokens all attend to each other."""
        return replace(self, block_size=num_draft_tokens + self.first_slot)

    @property
    def owns_head(self) -> bool:
        """Whether it has an LM head; with the full vocabulary, it uses the verifier's."""
        return self.draft_vocab_size != self.vocab_size

    def attention_json(self) -> dict[str, Any]:
        """The keys by which engines choose between full attention and a window."""
        kind = FULL if self.draft_window is None else SLIDING
        content: dict[str, Any] = {"layer_types": [kind] * self.num_layers}
        if self.draft_window is not None:
            content["sliding_window"] = self.draft_window
        return content

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json: what vLLM 0.32 reads, each value written out."""
        layers = self.layers_json(vocab_size=self.vocab_size) | self.attention_json()
        return {
            **self.speculators_json(),
            "transformer_layer_config": layers,
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            self.layer_ids_key: list(self.target_layer_ids),
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": False,
            # False makes layers with full attention causal, too.
            "sliding_window_non_causal": not self.causal_block,
            "dtype": dtype,
            **self.own_json(),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as in a checkpoint."""
        size = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (size, self.num_aux_layers * self.target_hidden_size),
            "hidden_norm.weight": (size,),
            "norm.weight": (size,),
        }
        if self.owns_head:
            shapes["lm_head.weight"] = (self.draft_vocab_size, size)
        for index in range(self.num_layers):
            layer = self.layer_shapes(input_size=size)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes
