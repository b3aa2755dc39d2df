"""Causal attention over documents with its log-sum-exp, and a backward that takes one.

FlashAttention where supported; elsewhere (float32, CPU) matrix products, document by document.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from speculators_cli.core.kernels.spans import Spans

# The public varlen attention does not pass the log-sum-exp to its backward, which is needed here.
_flash_forward = torch.ops.aten._flash_attention_forward  # noqa: SLF001
_flash_backward = torch.ops.aten._flash_attention_backward  # noqa: SLF001


class Causal(NamedTuple):
    """The outputs of a forward."""

    out: Tensor  # [queries, heads, head_dim]
    lse: Tensor  # [heads, queries], float32
    saved: tuple[Tensor, ...]  # tensors saved for the backward


def can_use_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether FlashAttention supports these queries: half precision on a recent GPU."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def forward(
    query: Tensor,  # [queries, heads, head_dim], laid out by `spans`
    key: Tensor,  # [seq_len, kv_heads, head_dim]
    value: Tensor,  # [seq_len, kv_heads, head_dim]
    spans: Spans,
    *,
    window: int | None = None,  # keys that a query sees, that of its own position included
) -> Causal:
    """Attend from each query to the keys of its document up to its own position."""
    if not can_use_flash(query.device, query.dtype, query.shape[-1]):
        return _dense_forward(query, key, value, spans, window)
    # With at most one query per document, the kernel would assume that no document has fewer.
    longest_query = max(spans.longest_query, 2)
    out, lse, rng_state, unused, _ = _flash_forward(
        query, key, value, spans.query_offsets, spans.key_offsets,
        longest_query, spans.longest_key, 0.0, True, False, **_flash_window(window),
    )  # fmt: skip
    return Causal(out, lse, (rng_state, unused))


def backward(
    grad_out: Tensor,  # [queries, heads, head_dim]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # [queries, heads, head_dim]
    lse: Tensor,  # [heads, queries], float32
    saved: Sequence[Tensor],
    spans: Spans,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, for a softmax with output `out` and `lse`."""
    if not can_use_flash(query.device, query.dtype, query.shape[-1]):
        return _dense_backward(grad_out, query, key, value, out, lse, spans, window)
    grads: tuple[Tensor, Tensor, Tensor] = _flash_backward(
        grad_out, query, key, value, out, lse, spans.query_offsets, spans.key_offsets,
        spans.longest_query, spans.longest_key, 0.0, True, *saved,
        **_flash_window(window),
    )  # fmt: skip
    return grads


def _flash_window(window: int | None) -> dict[str, int]:
    """The kernel's arguments; it counts keys before the query's, from a document's last query."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _documents(spans: Spans) -> Iterator[tuple[slice, slice]]:
    for queries, keys in zip(pairwise(spans.query_bounds), pairwise(spans.key_bounds), strict=True):
        if queries[0] < queries[1]:
            yield slice(*queries), slice(*keys)


def _scores(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return the scaled scores of a document's last queries; [kv_heads, group, queries, keys]."""
    num_queries, _, head_dim = query.shape
    grouped = query.view(num_queries, key.shape[1], -1, head_dim) * head_dim**-0.5
    scores = torch.einsum("qngd,knd->ngqk", grouped, key)
    first = len(key) - num_queries  # the position of the first query
    ones = torch.ones(num_queries, len(key), dtype=torch.bool, device=key.device)
    hidden = ones.triu(first + 1)
    if window is not None:
        hidden |= ones.tril(first - window)
    masked: Tensor = scores.masked_fill(hidden, float("-inf"))
    return masked


def _dense_forward(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, window: int | None
) -> Causal:
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for queries, keys in _documents(spans):
        scores = _scores(query[queries], key[keys], window)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        out[queries] = torch.einsum("ngqk,knd->qngd", weights, value[keys]).flatten(1, 2)
        lse[:, queries] = scores.float().logsumexp(-1).flatten(0, 1)
    return Causal(out, lse, ())


def _dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Spans,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = map(torch.zeros_like, (query, key, value))
    num_kv_heads, scale = key.shape[1], query.shape[-1] ** -0.5
    for queries, keys in _documents(spans):

        def grouped(x: Tensor, queries: slice = queries) -> Tensor:
            own: Tensor = x[queries].unflatten(1, (num_kv_heads, -1))
            return own

        scores = _scores(query[queries], key[keys], window).float()
        joint = lse[:, queries].unflatten(0, (num_kv_heads, -1))[..., None]
        weights = (scores - joint).exp()  # [kv_heads, group, queries, keys]
        delta = (grouped(out) * grouped(grad_out)).sum(-1).permute(1, 2, 0)[..., None]
        grad_weights = torch.einsum("qngd,knd->ngqk", grouped(grad_out), value[keys])
        grad_scores = (weights * (grad_weights - delta) * scale).to(query.dtype)
        grad_query[queries] = torch.einsum("ngqk,knd->qngd", grad_scores, key[keys]).flatten(1, 2)
        grad_key[keys] = torch.einsum("ngqk,qngd->knd", grad_scores, grouped(query))
        grad_value[keys] = torch.einsum(
            "ngqk,qngd->knd", weights.to(value.dtype), grouped(grad_out)
        )
    return grad_query, grad_key, grad_value
