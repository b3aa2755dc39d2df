"""A random verifier for the benchmarks: its config and the tensors that training reads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from speculators_cli.core.models.verifier import VerifierConfig


def write_verifier(
    folder: Path,
    verifier: VerifierConfig,
    vocab_size: int,
    *,
    is_tied: bool,
    device: torch.device,
) -> None:
    """Write a Llama folder with random embedding and head, drawn on `device`, and a norm of ones.

    A head that is tied to the embedding is not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    shape = (vocab_size, verifier.hidden_size)
    names = ["model.embed_tokens.weight"] + ([] if is_tied else ["lm_head.weight"])
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device)
        .normal_(std=0.02, generator=generator)
        .cpu()
        for name in names
    }
    tensors["model.norm.weight"] = torch.ones(verifier.hidden_size, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": verifier.hidden_size,
        "intermediate_size": verifier.intermediate_size,
        "num_hidden_layers": verifier.num_layers,
        "num_attention_heads": verifier.num_heads,
        "num_key_value_heads": verifier.num_kv_heads,
        "head_dim": verifier.head_dim,
        "vocab_size": vocab_size,
        "rms_norm_eps": verifier.rms_norm_eps,
        "rope_theta": verifier.rope_parameters["rope_theta"],
        "max_position_embeddings": verifier.max_position_embeddings,
        "tie_word_embeddings": is_tied,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
