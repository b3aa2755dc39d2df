"""Attention within documents, written from its definition: one query and one head at a time."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def attend_by_definition(
    query: Tensor,  # [tokens, heads, head_dim]
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,  # [tokens, kv_heads, value_dim]
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """[tokens, heads, value_dim], float64: a sink takes its share of the weights and gives none."""
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(len(q), q.shape[1], v.shape[-1], dtype=torch.float64)
    for start, end in pairwise([0, *accumulate(lengths)]):
        for at in range(start, end):
            first = start if window is None else max(start, at - window + 1)
            for head in range(q.shape[1]):
                scores = k[first : at + 1, head // group] @ q[at, head] * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                weights = scores.exp()
                sink = sinks[head].double().exp() if sinks is not None else 0.0
                out[at, head] = weights @ v[first : at + 1, head // group] / (weights.sum() + sink)
    return out
