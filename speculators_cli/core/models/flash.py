"""Joint attention on a GPU: FlashAttention for step 0, later steps merged in by log-sum-exp."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The public varlen attention hides the log-sum-exp from its backward, which is what is needed here.
_flash_forward = torch.ops.aten._flash_attention_forward  # noqa: SLF001
_flash_backward = torch.ops.aten._flash_attention_backward  # noqa: SLF001


def can_use_flash(query: Tensor) -> bool:
    """Whether the FlashAttention kernel takes such queries: half precision on a recent GPU."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class FlashJointAttention(torch.autograd.Function):
    r"""One softmax over step 0's causal keys and each later step's own key.

    With :math:`s_{ij}` the scores of step 0, :math:`t_{ik}` the score of step k's own key, and
    :math:`L_i = \log(\sum_j e^{s_{ij}} + \sum_k e^{t_{ik}})`, the output is
    :math:`o_i = \sum_j e^{s_{ij} - L_i} v_j + \sum_k e^{t_{ik} - L_i} v_{ik}`. The kernel gives the
    first sum with its own log-sum-exp, which is then rescaled to :math:`L`. A softmax's backward
    needs :math:`L` and :math:`\Delta_i = o_i \cdot do_i` only, so the kernel's backward, given the
    joint output and the joint :math:`L`, returns the exact gradients of its part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [seq_len, heads, head_dim], half precision
        bounds: tuple[int, ...],
        *keys_and_values: Tensor,  # as `plain_attention`
    ) -> Tensor:
        """Same as `plain_attention`."""
        num_steps = len(keys_and_values) // 2
        keys, values = keys_and_values[:num_steps], keys_and_values[num_steps:]
        offsets = torch.tensor(bounds, dtype=torch.int32).to(query.device, non_blocking=True)
        longest = max(stop - start for start, stop in pairwise(bounds))
        out, lse, rng_state, unused, _ = _flash_forward(
            query, keys[0], values[0], offsets, offsets, longest, longest, 0.0, True, False
        )
        if num_steps > 1:
            out, lse = _merge(query, out, lse, keys[1:], values[1:])
        ctx.save_for_backward(query, *keys_and_values, out, lse, offsets, rng_state, unused)
        ctx.longest = longest
        joint: Tensor = out
        return joint

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the query and of every step's keys and values."""
        query, *rest = ctx.saved_tensors
        *keys_and_values, out, lse, offsets, rng_state, unused = rest
        num_steps = len(keys_and_values) // 2
        keys, values = keys_and_values[:num_steps], keys_and_values[num_steps:]
        grad_out = grads[0].contiguous()
        grad_query, grad_key, grad_value = _flash_backward(
            grad_out, query, keys[0], values[0], out, lse, offsets, offsets,
            ctx.longest, ctx.longest, 0.0, True, rng_state, unused,
        )  # fmt: skip
        grad_keys, grad_values = [grad_key], [grad_value]
        if num_steps > 1:
            grad_query = grad_query.float()
            delta = (out.float() * grad_out.float()).sum(-1)  # [seq_len, heads]
            for key, value in zip(keys[1:], values[1:], strict=True):
                grad_own_query, grad_own_key, grad_own_value = _own_backward(
                    query, key, value, lse, grad_out, delta
                )
                grad_query += grad_own_query
                grad_keys.append(grad_own_key)
                grad_values.append(grad_own_value)
        return grad_query.to(query.dtype), None, *grad_keys, *grad_values


def _own_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled score of each query with the key at its own position; [seq_len, heads], float32."""
    length, num_heads, head_dim = query.shape
    grouped = query.view(length, key.shape[1], -1, head_dim).float()
    scores = (grouped * key[:, :, None].float()).sum(-1) * head_dim**-0.5
    flat: Tensor = scores.view(length, num_heads)
    return flat


def _spread(per_kv_head: Tensor, num_heads: int) -> Tensor:
    """Repeat [seq_len, kv_heads, head_dim] over the query heads of each group, as a view."""
    length, num_kv_heads, head_dim = per_kv_head.shape
    group = num_heads // num_kv_heads
    return per_kv_head[:, :, None].expand(-1, -1, group, -1).reshape(length, num_heads, head_dim)


def _gather(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """Sum [seq_len, heads, head_dim] over the query heads of each group."""
    length, _, head_dim = per_head.shape
    return per_head.view(length, num_kv_heads, -1, head_dim).sum(2)


def _merge(
    query: Tensor,
    out: Tensor,  # [seq_len, heads, head_dim]: softmax over step 0 alone
    lse: Tensor,  # [heads, seq_len], float32: its log-sum-exp
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Bring the later steps' own keys into the softmax; output and joint log-sum-exp."""
    scores = torch.stack([lse.T, *(_own_scores(query, key) for key in keys)])  # [steps, seq, heads]
    joint = scores.logsumexp(0)
    weights = (scores - joint).exp()[..., None]  # [steps, seq_len, heads, 1]
    merged = weights[0] * out
    for weight, value in zip(weights[1:], values, strict=True):
        merged += weight * _spread(value, query.shape[1])
    return merged.to(query.dtype), joint.T.contiguous()


def _own_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,  # [heads, seq_len], float32: joint
    grad_out: Tensor,
    delta: Tensor,  # [seq_len, heads], float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one later step's own key and value: query in float32, key, value."""
    num_heads, num_kv_heads, scale = query.shape[1], key.shape[1], query.shape[-1] ** -0.5
    weight = (_own_scores(query, key) - lse.T).exp()  # [seq_len, heads]
    grad_weight = (grad_out.float() * _spread(value, num_heads)).sum(-1)
    grad_score = (weight * (grad_weight - delta) * scale)[..., None]
    grad_query = grad_score * _spread(key, num_heads)
    grad_key = _gather(grad_score * query, num_kv_heads)
    grad_value = _gather(weight[..., None] * grad_out, num_kv_heads)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
