"""Layers against transformers' own, with copied weights."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.models.layers import DecoderLayer, Linear, RMSNorm, RotaryEmbedding
from speculators_cli.core.models.rope import ROPE_TYPES
from tests.tiny_drafts import make_config

SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 9e4}, SCALED_ROPE])
def test_decoder_layer_equals_transformers(arch: str, rope: dict[str, object]) -> None:
    config = make_config(arch=arch, rope_parameters=rope)
    config_class, layer_class = {
        "llama": (LlamaConfig, LlamaDecoderLayer),
        "qwen3": (Qwen3Config, Qwen3DecoderLayer),
    }[arch]
    theirs_config = config_class(
        hidden_size=24, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, rms_norm_eps=1e-5, rope_parameters=rope, max_position_embeddings=512,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: nn.Module = layer_class(theirs_config, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.3, std=0.2)
    ours = DecoderLayer(config)
    ours.load_state_dict(theirs.state_dict())
    hidden, positions = torch.randn(9, 24), torch.arange(3, 12)

    out = ours(hidden, RotaryEmbedding(config)(positions), TTTMemory((9,)))

    rope_tables = LlamaRotaryEmbedding(theirs_config)(hidden, positions[None])
    causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    expected = theirs(hidden[None], attention_mask=causal, position_embeddings=rope_tables)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # Two float32 orders of summation over 24 to 48 terms.
    torch.testing.assert_close(out, expected.view(9, 24), rtol=1e-4, atol=1e-5)


def test_layers_compute_in_the_dtype_of_their_input_and_keep_float32_gradients() -> None:
    linear, norm = Linear(5, 3), RMSNorm(3, 1e-5)

    out = norm(linear(torch.randn(4, 5, dtype=torch.bfloat16)))
    out.float().sum().backward()

    assert out.dtype == torch.bfloat16
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32


ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": SCALED_ROPE,
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    },
}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rope_equals_transformers_at_the_verifiers_longest(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 9e4, **ROPES[kind]}
    ours = RotaryEmbedding(make_config(rope_parameters=rope, max_position_embeddings=512))
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=rope,
            max_position_embeddings=512,
        )
    )  # fmt: skip
    positions = torch.arange(512)

    tables = ours(positions)

    expected = theirs(torch.empty(0), positions[None])
    for own, exact in zip(tables, expected, strict=True):
        # Angles of some hundreds of radians, rounded in float32.
        torch.testing.assert_close(own[:, 0], exact[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_a_position_turns_the_same_whatever_is_beside_it(kind: str) -> None:
    # Trap: factors chosen by the longest document of a packed sequence.
    rope = {"rope_type": kind, "rope_theta": 9e4, **ROPES[kind]}
    rotary = RotaryEmbedding(make_config(rope_parameters=rope, max_position_embeddings=512))

    alone, beside = rotary(torch.arange(10)), rotary(torch.arange(600))

    for few, many in zip(alone, beside, strict=True):
        assert torch.equal(few, many[:10])


def test_rope_scaling_changes_the_tables() -> None:
    # Trap: theta or scaling dropped, which a test with the default theta cannot see.
    positions = torch.arange(200)
    default = RotaryEmbedding(make_config())(positions)[0]

    other_theta = RotaryEmbedding(
        make_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    )(positions)[0]
    scaled = RotaryEmbedding(make_config(rope_parameters=SCALED_ROPE))(positions)[0]

    assert not torch.allclose(default, other_theta)
    assert not torch.allclose(default, scaled)
