"""RoPE of a draft: which of the verifier's it can have, and the frequencies it turns by."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from speculators_cli.core.models.config import Eagle3Config

# RoPE kinds that a llama or qwen3 layer of a serving engine computes.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def choose_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """RoPE of the verifier's full-attention layers, as one llama layer can compute it."""
    given = getattr(text, "rope_parameters", None) or {}
    given = given.get("full_attention", given)
    theta = float(given.get("rope_theta", 10000.0))
    if given.get("rope_type", "default") not in ROPE_TYPES:
        return {"rope_type": "default", "rope_theta": theta}
    left_out = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "type")
    kept = {key: value for key, value in given.items() if key not in left_out}
    return {"rope_type": "default", **kept, "rope_theta": theta}


def find_frequencies(config: Eagle3Config) -> tuple[Tensor, float]:
    """Radians a position for each pair, and what cosine and sine are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        pairs = torch.arange(0, config.head_dim, 2).float()
        return config.rope_parameters["rope_theta"] ** -(pairs / config.head_dim), 1.0
    verifier = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
    return ROPE_INIT_FUNCTIONS[kind](verifier, seq_len=config.max_position_embeddings)
