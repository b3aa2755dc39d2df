"""Layers of a draft model: each computes in the dtype of its input.

Weights are float32 master weights. A layer casts them to the dtype of its input, so the
activations decide the precision, on one device and on several alike, and gradients accumulate in
float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators_cli.core.models.attention import AttentionMemory
from speculators_cli.core.models.decoder_config import DecoderConfig
from speculators_cli.core.models.rope import find_frequencies


class Linear(nn.Linear):
    """A linear layer without bias that computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as in nn.Linear)
        """Multiply `[..., in_features]` by the weight."""
        return F.linear(input, self.weight.to(input.dtype))


class RMSNorm(nn.Module):
    """RMS norm with weights; the mean square is computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `[..., size]`."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """RoPE tables with the verifier's theta, scaling and head size, from the config.

    Types that depend on a length, `dynamic` and `longrope`, use the verifier's longest, as serving
    engines do: the tables of a document do not depend on what it is packed with.
    """

    frequencies: Tensor  # [head_dim/2], float32: radians per position for each pair

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        frequencies, self.scale = find_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        position_ids: Tensor,  # [seq_len], int64
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each position, each [seq_len, 1, head_dim], float32."""
        angles = position_ids[:, None, None].float() * self.frequencies.to(position_ids.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(
    x: Tensor,  # [seq_len, heads, head_dim]
    rope: tuple[Tensor, Tensor],  # cosine and sine, each [seq_len, 1, head_dim], float32
) -> Tensor:
    """Rotate each pair (i, i + head_dim/2) by its position's angle; float32 inside."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the keys and values of an `AttentionMemory`.

    Args:
        config: Sizes, and whether queries and keys are normalised (qwen3).
        input_size: Width of the input: twice the hidden size in the first layer.
    """

    def __init__(self, config: DecoderConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(input_size, config.num_heads * config.head_dim)
        self.k_proj = Linear(input_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(input_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.has_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,  # [seq_len, input_size]
        rope: tuple[Tensor, Tensor],
        memory: AttentionMemory,
    ) -> Tensor:
        """Attend from each position through `memory`; [seq_len, hidden]."""
        heads = (x.shape[0], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)), rope)
        key, value = self.keys_and_values(x, rope)
        out: Tensor = self.o_proj(memory.attend(query, key, value).flatten(1))
        return out

    def keys_and_values(
        self,
        x: Tensor,  # [seq_len, input_size]
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of each position, each [seq_len, kv_heads, head_dim]."""
        heads = (x.shape[0], -1, self.head_dim)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)), rope)
        return key, self.v_proj(x).view(heads)


class MLP(nn.Module):
    """Gated feed-forward layer of Llama and Qwen3."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [seq_len, hidden] to [seq_len, hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Standard decoder layer: every layer of a draft except its first."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,  # [seq_len, hidden]
        rope: tuple[Tensor, Tensor],
        memory: AttentionMemory,
    ) -> Tensor:
        """Add attention and feed-forward to the residual stream; [seq_len, hidden]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, memory)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out
