"""Attention over TTT steps: step 0 is causal per document, later steps attend only to themselves.

A query of TTT step k at position i attends to the keys of step 0 at positions j <= i of its
document, and to the keys of steps 1..k only at position i (EAGLE-3, arXiv 2503.01840, section 3.2).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from speculators_cli.core.kernels.causal_attention import can_use_flash
from speculators_cli.core.kernels.spans import Spans, document_bounds


class TTTMemory:
    """Keys and values of one layer over the TTT steps of one packed sequence.

    Args:
        lengths: Tokens of each document; the rest of the sequence is padding, which attends
            only to itself.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.spans: Spans | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as the next TTT step; [seq_len, heads, head_dim]."""
        self.keys.append(key)
        self.values.append(value)
        bounds = document_bounds(self.lengths, len(query))
        if not (can_use_flash(query.device, query.dtype, query.shape[-1]) and find_spec("triton")):
            return plain_attention(query, bounds, *self.keys, *self.values)
        from speculators_cli.core.kernels.joint_attention import joint_attention

        if self.spans is None:
            self.spans = Spans.of_documents(bounds, query.device)
        return joint_attention(query, self.keys, self.values, self.spans)


def plain_attention(
    query: Tensor,  # [seq_len, heads, head_dim]
    bounds: tuple[int, ...],  # starts of documents, and the end of the last one
    *keys_and_values: Tensor,  # keys of all steps, then values, each [seq_len, kv_heads, head_dim]
) -> Tensor:
    """Joint softmax over step 0's causal keys and the later steps' own keys, in float32.

    Returns:
        [seq_len, heads, head_dim], in the dtype of the query.
    """
    num_steps = len(keys_and_values) // 2
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # One split each: its backward is one copy, while that of a slice fills the whole sequence.
    queries, *parts = (tensor.split(lengths) for tensor in (query, *keys_and_values))
    outputs = [
        _document_attention(one, list(own[:num_steps]), list(own[num_steps:]))
        for one, *own in zip(queries, *parts, strict=True)
    ]
    return torch.cat(outputs)


def _document_attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """`plain_attention` within one document."""
    length, num_heads, head_dim = query.shape
    num_kv_heads = keys[0].shape[1]
    # Query heads g*group .. (g+1)*group-1 share key head g.
    grouped = query.view(length, num_kv_heads, -1, head_dim) * head_dim**-0.5
    causal = torch.einsum("qngd,knd->ngqk", grouped, keys[0])  # [kv_heads, group, length, length]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    causal = causal.masked_fill(future, float("-inf"))
    own = [torch.einsum("qngd,qnd->ngq", grouped, key)[..., None] for key in keys[1:]]
    weights = torch.cat([causal, *own], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    out = torch.einsum("ngqk,knd->qngd", weights[..., :length], values[0])
    for step, value in enumerate(values[1:]):
        out = out + torch.einsum("ngq,qnd->qngd", weights[..., length + step], value)
    return out.reshape(length, num_heads, head_dim)
