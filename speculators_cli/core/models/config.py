"""The checkpoint's config.json: an EAGLE-3 draft in the speculators format that vLLM reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speculators_cli import __version__

PRODUCER = "speculators-cli"
LAYER_IDS_ASSUMED = "layer_ids_assumed"  # true beside layer ids that are a guess


@dataclass(frozen=True)
class Eagle3Config:
    """Everything that fixes the shape and the mathematics of an EAGLE-3 draft."""

    arch: str  # kind of its decoder layers: `llama` or `qwen3`
    hidden_size: int
    target_hidden_size: int  # the verifier's; a draft trained here has the same
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]  # transformers' names: rope_type, rope_theta, factor ...
    max_position_embeddings: int
    vocab_size: int  # the verifier's embedding rows
    draft_vocab_size: int
    target_layer_ids: tuple[int, ...]  # id k: the verifier's output after k layers
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    ttt_steps: int
    verifier_name_or_path: str
    verifier_architectures: tuple[str, ...]
    are_layer_ids_assumed: bool = False  # a guess that nobody confirmed

    @property
    def num_aux_layers(self) -> int:
        """Number of verifier layers whose hidden states the draft reads."""
        return len(self.target_layer_ids)

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.arch == "qwen3"

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json: what vLLM 0.32 reads, each value written out."""
        layers: dict[str, Any] = {
            "model_type": self.arch,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(self.rope_parameters),
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
        if self.num_aux_layers != 3:
            layers["num_aux_hidden_states"] = self.num_aux_layers
        return {
            "model_type": "speculators",
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": self.ttt_steps}
                ],
                "verifier": {
                    "name_or_path": self.verifier_name_or_path,
                    "architectures": list(self.verifier_architectures),
                },
            },
            "transformer_layer_config": layers,
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(self.target_layer_ids),
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "dtype": dtype,
            **self.producer_json(),
        }

    def producer_json(self) -> dict[str, Any]:
        """Keys of our own in config.json, which no engine reads."""
        mark = {LAYER_IDS_ASSUMED: True} if self.are_layer_ids_assumed else {}
        return {**mark, "producer": {"name": PRODUCER, "version": __version__}}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft itself, as a checkpoint holds them."""
        size, target, inner = self.hidden_size, self.target_hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
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
            width = 2 * size if index == 0 else size
            layer: dict[str, tuple[int, ...]] = {
                "input_layernorm": (size,),
                "post_attention_layernorm": (size,),
                "self_attn.q_proj": (query, width),
                "self_attn.k_proj": (key, width),
                "self_attn.v_proj": (key, width),
                "self_attn.o_proj": (size, query),
                "mlp.gate_proj": (inner, size),
                "mlp.up_proj": (inner, size),
                "mlp.down_proj": (size, inner),
            }
            if index == 0:
                layer["hidden_norm"] = (size,)
            if self.has_qk_norm:
                layer |= {
                    "self_attn.q_norm": (self.head_dim,),
                    "self_attn.k_norm": (self.head_dim,),
                }
            shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return shapes
