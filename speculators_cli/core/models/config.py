"""The checkpoint's config.json: an EAGLE-3 draft in the speculators format that vLLM reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from speculators_cli import __version__

PRODUCER = "speculators-cli"


@dataclass(frozen=True)
class Eagle3Config:
    """Everything that fixes the shape and the mathematics of an EAGLE-3 draft."""

    arch: str  # kind of its decoder layers: `llama` or `qwen3`
    hidden_size: int  # of draft and verifier alike
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

    @property
    def num_aux_layers(self) -> int:
        """Number of verifier layers whose hidden states the draft reads."""
        return len(self.target_layer_ids)

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.arch == "qwen3"

    def to_json(self) -> dict[str, Any]:
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
            "target_hidden_size": self.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(self.target_layer_ids),
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "dtype": "float32",
            "producer": {"name": PRODUCER, "version": __version__},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote."""
        layers, speculators = content["transformer_layer_config"], content["speculators_config"]
        verifier = speculators["verifier"]
        return cls(
            arch=layers["model_type"],
            hidden_size=layers["hidden_size"],
            intermediate_size=layers["intermediate_size"],
            num_layers=layers["num_hidden_layers"],
            num_heads=layers["num_attention_heads"],
            num_kv_heads=layers["num_key_value_heads"],
            head_dim=layers["head_dim"],
            rms_norm_eps=layers["rms_norm_eps"],
            rope_parameters=layers["rope_parameters"],
            max_position_embeddings=layers["max_position_embeddings"],
            vocab_size=layers["vocab_size"],
            draft_vocab_size=content["draft_vocab_size"],
            target_layer_ids=tuple(content["eagle_aux_hidden_state_layer_ids"]),
            norm_before_residual=content["norm_before_residual"],
            norm_before_fc=content["norm_before_fc"],
            fc_norm=content["fc_norm"],
            norm_output=content["norm_output"],
            ttt_steps=speculators["proposal_methods"][0]["speculative_tokens"],
            verifier_name_or_path=verifier["name_or_path"],
            verifier_architectures=tuple(verifier["architectures"]),
        )
