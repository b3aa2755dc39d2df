"""Keys and values that a decoder layer attends to, kept across calls."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionMemory(Protocol):
    """Keys and values that the queries of one layer may attend to, kept across calls."""

    def attend(
        self,
        query: Tensor,  # [seq_len, heads, head_dim]
        key: Tensor,  # [seq_len, kv_heads, head_dim]
        value: Tensor,  # [seq_len, kv_heads, head_dim]
    ) -> Tensor:
        """Append the new keys and values, then attend; [seq_len, heads, head_dim]."""


class CausalMemory:
    """KV cache of one layer for one growing sequence.

    Args:
        window: A query at position q sees the keys k with q - k < window; None: all up to q.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally from the newest positions; [seq_len, heads, head_dim]."""
        self.keys = key if self.keys is None else torch.cat((self.keys, key))
        self.values = value if self.values is None else torch.cat((self.values, value))
        num_new, num_all = len(query), len(self.keys)
        first = num_all - num_new
        seen = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(first)
        if self.window is not None:
            seen = seen.triu(first - self.window + 1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            self.keys.transpose(0, 1)[None],
            self.values.transpose(0, 1)[None],
            attn_mask=seen,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
