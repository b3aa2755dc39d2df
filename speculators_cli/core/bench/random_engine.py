"""A whole verifier with random weights, to time the capture of hidden states."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.models.verifier import VerifierConfig


def llama_config(verifier: VerifierConfig, vocab_size: int) -> LlamaConfig:
    """The config of a model with Llama layers of these sizes."""
    return LlamaConfig(
        hidden_size=verifier.hidden_size,
        intermediate_size=verifier.intermediate_size,
        num_hidden_layers=verifier.num_layers,
        num_attention_heads=verifier.num_heads,
        num_key_value_heads=verifier.num_kv_heads,
        head_dim=verifier.head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=verifier.rms_norm_eps,
        max_position_embeddings=verifier.max_position_embeddings,
        rope_parameters=dict(verifier.rope_parameters),
        tie_word_embeddings=verifier.is_tied,
    )


def build_engine(
    verifier: VerifierConfig,
    vocab_size: int,
    layer_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_float8: bool,
) -> TransformersEngine:
    """Build a verifier of these sizes, with Llama layers; nothing is read."""
    config = llama_config(verifier, vocab_size)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    return TransformersEngine(
        model,
        layer_ids,
        end_ids=frozenset(),
        name=verifier.name_or_path,
        is_float8=is_float8,
    )
