"""The checkpoint's config.json: an EAGLE-3 draft in the speculators format that vLLM reads."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from speculators_cli.core.algorithms.draft_config import DraftConfig

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(DraftConfig):
    """All values that determine the shape and computation of an EAGLE-3 draft."""

    algorithm: ClassVar[str] = "eagle3"
    layer_ids_key: ClassVar[str] = "eagle_aux_hidden_state_layer_ids"

    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    ttt_steps: int

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that it was trained for: one per TTT step."""
        return self.ttt_steps

    def with_num_draft_tokens(self, num_draft_tokens: int) -> Self:
        """The same draft, proposing another number of tokens."""
        return replace(self, ttt_steps=num_draft_tokens)

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json: what vLLM 0.32 reads, each value written out."""
        layers = self.layers_json(vocab_size=self.vocab_size)
        if self.num_aux_layers != 3:
            layers["num_aux_hidden_states"] = self.num_aux_layers
        return {
            **self.speculators_json(),
            "transformer_layer_config": layers,
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            self.layer_ids_key: list(self.target_layer_ids),
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "dtype": dtype,
            **self.own_json(),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as in a checkpoint."""
        size, target = self.hidden_size, self.target_hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (size, self.num_aux_layers * target),
            "norm.weight": (size,),
            "lm_head.weight": (self.draft_vocab_size, size),
        }
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (self.num_aux_layers * target,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (target,) for i in range(self.num_aux_layers)}
        for index in range(self.num_layers):
            # The first layer also reads the token's embedding.
            layer = self.layer_shapes(input_size=2 * size if index == 0 else size)
            if index == 0:
                layer["hidden_norm.weight"] = (size,)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes
