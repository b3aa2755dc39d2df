"""Tiny random models of the families that the transformers engine runs.

Dimensions all differ: hidden 24, heads 6 of 8, 2 of keys, vocab 37. Windows are shorter than the
documents of the tests.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t

HIDDEN, VOCAB, NUM_LAYERS, END_ID = 24, 37, 4, 2
PLAIN: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END_ID,
}
SIZES: dict[str, Any] = PLAIN | {"head_dim": 8}  # its own, not hidden / heads
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING: dict[str, Any] = {"sliding_window": 6}
EVERY_SECOND: dict[str, Any] = SLIDING | {
    "layer_types": ["sliding_attention", "full_attention"] * 2
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT: dict[str, Any] = PLAIN | {"num_key_value_heads": 6, "q_lora_rank": 12, "kv_lora_rank": 10}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 20}
CLIP: dict[str, Any] = VISION | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}

# With the only attention that caps; some versions of transformers choose another.
CAPPED: dict[str, Any] = {"attn_logit_softcapping": 2.0, "attn_implementation": "eager"}

# Configs of families whose documents are packed.
PACKED: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**SIZES),
    "wide-llama": lambda: t.LlamaConfig(**SIZES | {"hidden_size": 48, "intermediate_size": 64}),
    "qwen2-half-sliding": lambda: t.Qwen2Config(
        **PLAIN, **SLIDING, use_sliding_window=True, max_window_layers=2
    ),
    "qwen3": lambda: t.Qwen3Config(**SIZES),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=1),
    "gemma2": lambda: t.Gemma2Config(
        **SIZES, **SLIDING, **CAPPED, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**SIZES, **EVERY_SECOND),
    "gemma3-with-images": lambda: t.Gemma3Config(
        text_config=SIZES | EVERY_SECOND, vision_config=CLIP | {"patch_size": 14}
    ),
    "gemma4": lambda: t.Gemma4TextConfig(
        **SIZES, **EVERY_SECOND, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=10
    ),
    "mistral": lambda: t.MistralConfig(**SIZES, **SLIDING),
    "phi": lambda: t.PhiConfig(**PLAIN),
    "phi3": lambda: t.Phi3Config(**PLAIN, **SLIDING),
    "gpt-oss": lambda: t.GptOssConfig(
        **SIZES, **EVERY_SECOND, num_local_experts=5, num_experts_per_tok=2, rope_parameters=ROPE
    ),
    "deepseek-v3": lambda: t.DeepseekV3Config(
        **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "qwen2.5-vl": lambda: t.Qwen2_5_VLConfig(
        text_config=PLAIN | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
        vision_config=VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
    ),
    "opt": lambda: t.OPTConfig(
        hidden_size=HIDDEN, ffn_dim=40, num_hidden_layers=NUM_LAYERS, num_attention_heads=6,
        vocab_size=VOCAB, max_position_embeddings=128, word_embed_proj_dim=HIDDEN, pad_token_id=0,
    ),
}  # fmt: skip
# Configs of families with layers that carry a state from token to token, that see only a chunk, or
# whose attention cannot be replaced.
ALONE: Mapping[str, Callable[[], Any]] = {
    "qwen3-next": lambda: t.Qwen3NextConfig(
        **SIZES, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16
    ),
    "llama4": lambda: t.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, attention_chunk_size=8, num_local_experts=3,
        num_experts_per_tok=1, interleave_moe_layer_step=2,
    ),
    "bamba": lambda: t.BambaConfig(
        **PLAIN, attn_layer_indices=[1, 3], mamba_n_heads=6, mamba_d_head=8, mamba_d_state=4,
        mamba_n_groups=1, mamba_chunk_size=4,
    ),
    "bloom": lambda: t.BloomConfig(
        hidden_size=HIDDEN, n_layer=NUM_LAYERS, n_head=6, vocab_size=VOCAB, pad_token_id=0
    ),
}  # fmt: skip
# Of each kind of attention one family, and one without a cache by position.
SERVED = (
    *("llama", "qwen3", "qwen3-moe", "gemma2", "gemma3", "mistral", "phi", "gpt-oss"),
    "bamba",
)
CLASSES = {
    "gemma3-with-images": t.Gemma3ForConditionalGeneration,
    "qwen2.5-vl": t.Qwen2_5_VLForConditionalGeneration,
}
FAMILIES = {**PACKED, **ALONE}


def build_model(name: str) -> Any:
    """A model of a family, with weights that leave no layer without effect."""
    config = FAMILIES[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls: Any = CLASSES.get(name)
        model: Any = (
            t.AutoModelForCausalLM.from_config(config) if cls is None else cls._from_config(config)
        )
        for weights in model.parameters():
            # Norms, biases and sinks are moved from where they begin, matrices drawn anew.
            noise = torch.randn_like(weights, dtype=torch.float32) * 0.15
            weights.data = noise + (weights.data.float() if weights.dim() == 1 else 0)
    return model.float().eval()
