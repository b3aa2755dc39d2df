"""Tiny models whose dimensions all differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.eagle3 import Eagle3Draft
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig

MakeConfig = Callable[..., Eagle3Config]
MakeDraft = Callable[..., Eagle3Draft]


@pytest.fixture
def make_config() -> MakeConfig:
    """Builds an `Eagle3Config` of hidden size 24; any field can be given."""

    def make(**changes: Any) -> Eagle3Config:
        fields: dict[str, Any] = {
            "arch": "llama",
            "hidden_size": 24,
            "target_hidden_size": 24,
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
def make_draft() -> MakeDraft:
    """Builds an `Eagle3Draft` over given verifier tensors; its weights are not filled."""

    def make(
        config: Eagle3Config,
        *,
        embedding: Tensor,
        head: Tensor,
        norm_gain: Tensor | None,
        kept_ids: Tensor,
        loss_decay: float,
    ) -> Eagle3Draft:
        gain = torch.ones(config.hidden_size) if norm_gain is None else norm_gain
        verifier_config = VerifierConfig(
            name_or_path=config.verifier_name_or_path,
            architectures=config.verifier_architectures,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=9,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            norm_offset=0.0,
            is_tied=False,
            logit_softcap=None,
            logit_scale=1.0,
        )
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, kept_ids, True)
        return Eagle3Draft(
            config,
            FrozenVerifier(embedding, gain, head, verifier_config),
            VocabMap(kept_ids - torch.arange(len(kept_ids)), t2d),
            loss=kl_loss,
            loss_decay=loss_decay,
            train_head=True,
        )

    return make


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)
