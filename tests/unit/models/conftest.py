"""Tiny models whose dimensions all differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from speculators_cli.core.models.config import Eagle3Config

MakeConfig = Callable[..., Eagle3Config]


@pytest.fixture
def make_config() -> MakeConfig:
    """Builds an `Eagle3Config` of hidden size 24; any field can be given."""

    def make(**changes: Any) -> Eagle3Config:
        fields: dict[str, Any] = {
            "arch": "llama",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_layers": 1,
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "max_position_embeddings": 512,
            "vocab_size": 37,
            "draft_vocab_size": 19,
            "target_layer_ids": (2, 4, 7),
            "norm_before_residual": True,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "ttt_steps": 3,
            "verifier_name_or_path": "example/verifier",
            "verifier_architectures": ("LlamaForCausalLM",),
        }
        return Eagle3Config(**(fields | changes))

    return make


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)
