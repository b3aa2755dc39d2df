"""Tiny random verifiers of the families that engines serve most, whose answers are not constant."""

from typing import Any

import torch
import transformers

VOCAB = 61
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = 8
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                               "moe_intermediate_size": 24}),
    "gemma-3": ("Gemma3", {"head_dim": 8, "sliding_window": _WINDOW, "layer_types":
                           ["sliding_attention", "full_attention"] * 2}),
    "gemma-2": ("Gemma2", {"head_dim": 8, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8,
                           "attn_logit_softcapping": 5.0}),
    "mistral": ("Mistral", {"sliding_window": _WINDOW}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "gpt-oss": ("GptOss", {"head_dim": 8, "sliding_window": _WINDOW, "num_local_experts": 4,
                           "num_experts_per_tok": 2, "layer_types":
                           ["sliding_attention", "full_attention"] * 2}),
    # Convolutions carry state from token to token: no cache by position.
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
}  # fmt: skip
FAMILIES = tuple(_CONFIGS)


def make_verifier(family: str) -> Any:
    """A model of a family, in float32."""
    name, changes = _CONFIGS[family]
    kind = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, f"{name}{kind}")(**_SIZES | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for key, parameter in model.named_parameters():
            is_norm = "norm" in key and not key.endswith("bias")
            mean, std = (1.0, 0.1) if is_norm else (0.0, 0.25)
            torch.nn.init.normal_(parameter, mean=mean, std=std)
    return model
