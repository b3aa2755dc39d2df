"""Attention over TTT steps: step 0 is causal per document, later steps attend only to themselves.

A query of TTT step k at position i attends to the keys of step 0 at positions j <= i of its
document, and to the keys of steps 1..k only at position i (EAGLE-3, arXiv 2503.01840, section 3.2).

In an engine, the query of step k at i stands at position i + k, and the key of step m at i + m. A
sliding window of W hides what is W or more positions before the query: of step 0 the keys with
j <= i + k - W, of later steps those with m <= k - W.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from speculators_cli.core.kernels.causal_attention import can_use_flash
from speculators_cli.core.kernels.spans import Spans, document_bounds

MIN_BLOCK = 1024  # queries at once with a window: few blocks, whose scores fit in memory


class TTTMemory:
    """Keys and values of one layer over the TTT steps of one packed sequence.

    Args:
        lengths: Tokens of each document; the rest of the sequence is padding, which attends
            only to itself.
        window: Positions that a query sees, its own included; None: all.
    """

    def __init__(self, lengths: Sequence[int], window: int | None = None) -> None:
        self.lengths = tuple(lengths)
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.spans: Spans | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as the next TTT step; [seq_len, heads, head_dim]."""
        self.keys.append(key)
        self.values.append(value)
        bounds = document_bounds(self.lengths, len(query))
        can_join = can_use_flash(query.device, query.dtype, query.shape[-1]) and find_spec("triton")
        if not can_join or not is_joinable(self.window, num_steps=len(self.keys)):
            return plain_attention(query, bounds, *self.keys, *self.values, window=self.window)
        from speculators_cli.core.kernels.joint_attention import joint_attention

        if self.spans is None:
            self.spans = Spans.of_documents(bounds, query.device)
        return joint_attention(query, self.keys, self.values, self.spans, window=self.window)


def is_joinable(window: int | None, *, num_steps: int) -> bool:
    """Whether `joint_attention` computes this window: it does not hide keys of later steps."""
    return window is None or window >= num_steps


def plain_attention(
    query: Tensor,  # [seq_len, heads, head_dim]
    bounds: tuple[int, ...],  # starts of documents, and the end of the last one
    *keys_and_values: Tensor,  # keys of all steps, then values, each [seq_len, kv_heads, head_dim]
    window: int | None = None,
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
        _document_attention(one, list(own[:num_steps]), list(own[num_steps:]), window)
        for one, *own in zip(queries, *parts, strict=True)
    ]
    return torch.cat(outputs)


def _document_attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], window: int | None
) -> Tensor:
    """`plain_attention` within one document."""
    length, last = len(query), len(keys) - 1
    if window is None or window >= length + last:
        return _block_attention(query, keys, values, 0, None)
    # Of the later steps' own keys, those from here on; the last step's is always seen.
    first_own = max(1, last - window + 1)
    size = max(window, MIN_BLOCK)
    own_parts = [x.split(size) for x in (*keys[first_own:], *values[first_own:])]
    key_parts, value_parts = keys[0].split(size), values[0].split(size)
    outputs = []
    for index, (block, *own) in enumerate(zip(query.split(size), *own_parts, strict=True)):
        # The first of its queries sees no more than the block before.
        near = slice(max(index - 1, 0), index + 1)
        before = (index - near.start) * size  # keys before its first query
        cut = max(before + last - window + 1, 0)
        num_own = len(own) // 2
        block_keys = [torch.cat(key_parts[near])[cut:], *own[:num_own]]
        block_values = [torch.cat(value_parts[near])[cut:], *own[num_own:]]
        outputs.append(
            _block_attention(block, block_keys, block_values, before - cut, window - last)
        )
    return torch.cat(outputs)


def _block_attention(
    query: Tensor,  # [queries, heads, head_dim]
    keys: list[Tensor],  # step 0: [keys, kv_heads, head_dim]; later: [queries, ...]
    values: list[Tensor],
    first: int,  # the query's position among step 0's keys; below 0 if it sees none of them
    window: int | None,  # of step 0's keys; 0 or less: none
) -> Tensor:
    """Attend from neighbouring queries of a document; [queries, heads, head_dim]."""
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = keys[0].shape[:2]
    # Query heads g*group .. (g+1)*group-1 share key head g.
    grouped = query.view(num_queries, num_kv_heads, -1, head_dim) * head_dim**-0.5
    causal = torch.einsum("qngd,knd->ngqk", grouped, keys[0])  # [kv_heads, group, queries, keys]
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    hidden = ones.triu(first + 1)
    if window is not None:
        hidden |= ones.tril(first - window)
    causal = causal.masked_fill(hidden, float("-inf"))
    own = [torch.einsum("qngd,qnd->ngq", grouped, key)[..., None] for key in keys[1:]]
    weights = torch.cat([causal, *own], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    out = torch.einsum("ngqk,knd->qngd", weights[..., :num_keys], values[0])
    for step, value in enumerate(values[1:]):
        out = out + torch.einsum("ngq,qnd->qngd", weights[..., num_keys + step], value)
    return out.reshape(num_queries, num_heads, head_dim)
