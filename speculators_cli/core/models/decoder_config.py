"""DecoderConfig: the decoder layers of a draft model, as a serving engine computes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Kinds of layer in config.json, as in transformers.
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and hyperparameters of a stack of decoder layers."""

    arch: str  # kind of layer: `llama` or `qwen3`
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]  # keys as in transformers: rope_type, rope_theta, factor ...
    max_position_embeddings: int
    sliding_window: int | None = None  # a query sees this many keys, its own included; None: all
    full_attention_layers: tuple[int, ...] = ()  # those without the window, if there is one

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None: full attention."""
        full = self.full_attention_layers
        return tuple(None if i in full else self.sliding_window for i in range(self.num_layers))

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.arch == "qwen3"

    def layers_json(self, *, vocab_size: int) -> dict[str, Any]:
        """Return the layers as a transformers `config.json`, with all values explicit."""
        windows: dict[str, Any] = {}
        if self.sliding_window is not None:
            # Engines read the first two; transformers drops the window of qwen3 without the third.
            windows = {
                "layer_types": [FULL if x is None else SLIDING for x in self.windows],
                "sliding_window": self.sliding_window,
                "use_sliding_window": True,
            }
        return {
            "model_type": self.arch,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(self.rope_parameters),
            "attention_bias": False,
            "tie_word_embeddings": False,
            **windows,
        }

    def layer_shapes(self, *, input_size: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of one layer's weights, for attention inputs of `input_size`."""
        size, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (size,),
            "post_attention_layernorm.weight": (size,),
            "self_attn.q_proj.weight": (query, input_size),
            "self_attn.k_proj.weight": (key, input_size),
            "self_attn.v_proj.weight": (key, input_size),
            "self_attn.o_proj.weight": (size, query),
            "mlp.gate_proj.weight": (inner, size),
            "mlp.up_proj.weight": (inner, size),
            "mlp.down_proj.weight": (size, inner),
        }
        if self.has_qk_norm:
            shapes |= {
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
            }
        return shapes
