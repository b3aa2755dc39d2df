r"""Joint attention: step 0's keys through a library kernel, later steps' own keys merged in.

With :math:`s_{ij}` the scaled scores of step 0, :math:`t_{ik}` the score of step k's own key, and
:math:`L_i = \log(\sum_j e^{s_{ij}} + \sum_k e^{t_{ik}})`, the output is
:math:`o_i = \sum_j e^{s_{ij} - L_i} v_j + \sum_k e^{t_{ik} - L_i} v_{ik}`. The causal kernel gives
the first sum with a log-sum-exp of its own, which one pass then rescales to :math:`L`. A softmax's
backward needs :math:`L` and :math:`\Delta_i = o_i \cdot do_i` only, so the kernel's backward, given
the joint output and the joint :math:`L`, returns the exact gradients of its part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels import causal_attention
from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.rows import pick_rows
from speculators_cli.core.kernels.spans import Spans


def joint_attention(
    query: Tensor,  # [queries, heads, head_dim], laid out by `spans`, zeros in the gaps
    keys: Sequence[Tensor],  # step 0: [seq_len, kv_heads, head_dim]; later: [active or more, ...]
    values: Sequence[Tensor],  # as the keys
    spans: Spans,
    *,
    window: int | None = None,
    into: Tensor | None = None,  # [active, heads, head_dim]: the memory of the result
) -> Tensor:
    """Attend from each row; [active, heads, head_dim].

    Later steps may have keys of more rows, after those of the ones that attend.

    With a window, a row's query of TTT step k sees its k own keys and the `window - k` newest of
    step 0; the window must exceed k.
    """
    if window is not None:
        window -= len(keys) - 1
        assert window > 0, "a window within the own keys takes the plain path"
    # In a list, `into` is no input for autograd.
    out: Tensor = _JointAttention.apply(query, spans, window, [into], *keys, *values)
    return out


class _JointAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        spans: Spans,
        window: int | None,  # of step 0's keys
        room: list[Tensor | None],
        *keys_and_values: Tensor,
    ) -> Tensor:
        num_steps = len(keys_and_values) // 2
        query = query.contiguous()
        causal = causal_attention.forward(
            query, keys_and_values[0], keys_and_values[num_steps], spans, window=window
        )
        own = _Own.of(keys_and_values)
        out, lse = _merge(query, own, causal.out, causal.lse, spans.places, room[0])
        ctx.save_for_backward(query, *keys_and_values, out, lse, *causal.saved)
        ctx.spans, ctx.window, ctx.num_steps = spans, window, num_steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spans, num_steps = ctx.spans, ctx.num_steps
        query, *rest = ctx.saved_tensors
        keys_and_values, (out, lse, *saved) = rest[: 2 * num_steps], rest[2 * num_steps :]
        grad_out = grads[0].contiguous()
        grad_causal, grad_key, grad_value = causal_attention.backward(
            _laid_out(grad_out, spans),
            query,
            keys_and_values[0],
            keys_and_values[num_steps],
            _laid_out(out, spans),
            _laid_out(lse, spans).T.contiguous(),
            saved,
            spans,
            window=ctx.window,
        )
        own = _Own.of(keys_and_values)
        grad_query, grad_own_keys, grad_own_values = _merge_backward(
            query, own, out, lse, grad_out, grad_causal, spans.places
        )
        return (
            grad_query,
            None,
            None,
            None,
            grad_key,
            *grad_own_keys,
            grad_value,
            *grad_own_values,
        )


def _laid_out(
    x: Tensor,  # [active, ...]
    spans: Spans,
) -> Tensor:
    """Scatter each row to its place for the causal kernel, zeros in the gaps; [queries, ...]."""
    return x.contiguous() if spans.sources is None else pick_rows(x, spans.sources)


class _Own(NamedTuple):
    """Keys and values of later steps, each [rows, kv_heads, head_dim], each row contiguous."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_kv_heads: int

    @classmethod
    def of(cls, keys_and_values: Sequence[Tensor]) -> "_Own":
        """Select all but step 0's."""
        num_steps = len(keys_and_values) // 2
        keys, values = keys_and_values[1:num_steps], keys_and_values[num_steps + 1 :]
        return cls(tuple(keys), tuple(values), keys_and_values[0].shape[1])

    def arguments(self) -> tuple[Any, ...]:
        """Return the kernels' arguments: pointers, and row strides, equal in all steps."""
        # The stride of a single row is not read.
        strides = [
            {x.stride(0) for x in parts if len(x) > 1} or {0} for parts in (self.keys, self.values)
        ]
        (key_stride,), (value_stride,) = strides
        return self.keys, key_stride, self.values, value_stride

    def sizes(self, query: Tensor) -> dict[str, int]:
        """Return the kernels' constants."""
        _, num_heads, head_dim = query.shape
        group = num_heads // self.num_kv_heads
        group_block = triton.next_power_of_2(group)
        kv_block = triton.next_power_of_2(self.num_kv_heads)
        dim_block = triton.next_power_of_2(head_dim)
        return {
            "NUM_OWN": len(self.keys),
            "WIDTH": num_heads * head_dim,
            "GROUP": group,
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": head_dim,
            "GROUP_BLOCK": group_block,
            "KV_BLOCK": kv_block,
            "DIM_BLOCK": dim_block,
            # 32 values per thread: eight neighbours of a head, of four heads of a group, whose sum
            # then needs no other thread.
            "num_warps": min(max(group_block * kv_block * dim_block // 1024, 1), 8),
        }


def _merge(
    query: Tensor,
    own: _Own,
    causal_out: Tensor,  # softmax over step 0 only
    causal_lse: Tensor,  # [heads, queries], float32: its log-sum-exp
    places: Tensor | None,
    into: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of all keys: [active, heads, head_dim], [active, heads]."""
    num_queries, num_heads, head_dim = query.shape
    num_rows = num_queries if places is None else len(places)
    out = query.new_empty(num_rows, num_heads, head_dim) if into is None else into
    lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=query.device)
    launch(_merge_kernel, (num_rows,))(
        query, *own.arguments(), causal_out, causal_lse, causal_lse.stride(0),
        query if places is None else places, out, lse, head_dim**-0.5,
        HAS_PLACES=places is not None, **own.sizes(query),
    )  # fmt: skip
    return out, lse


def _merge_backward(
    query: Tensor,
    own: _Own,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_causal: Tensor,  # [queries, heads, head_dim]: gradient of the query through step 0
    places: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of the query (all keys, unset in the gaps), own keys and own values."""
    num_rows, _, head_dim = out.shape
    grad_query = torch.empty_like(query)
    grad_keys, grad_values = (
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts]
        for parts in (own.keys, own.values)
    )
    for grad in (*grad_keys, *grad_values):
        if len(grad) > num_rows:
            grad[num_rows:].zero_()
    launch(_merge_backward_kernel, (num_rows,))(
        query, *own.arguments(),
        out, lse, grad_out, grad_causal, query if places is None else places,
        grad_query, tuple(grad_keys), tuple(grad_values), head_dim**-0.5,
        HAS_PLACES=places is not None, **own.sizes(query),
    )  # fmt: skip
    return grad_query, grad_keys, grad_values


@triton.jit
def _find(
    places,
    HAS_PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Return a program's row and place, its heads, the offsets of their values, and the mask.

    Heads are [group, kv_heads], values [group, kv_heads, head_dim], of keys [kv_heads, head_dim].
    """
    row = tl.program_id(0).to(tl.int64)
    place = row
    if HAS_PLACES:
        place = tl.load(places + row)
    member = tl.arange(0, GROUP_BLOCK)[:, None]
    kv_head = tl.arange(0, KV_BLOCK)[None, :]
    i = tl.arange(0, DIM_BLOCK)
    heads = kv_head * GROUP + member
    is_head = (member < GROUP) & (kv_head < KV_HEADS)
    at = heads[:, :, None] * HEAD_DIM + i[None, None, :]
    inside = is_head[:, :, None] & (i < HEAD_DIM)[None, None, :]
    kv_heads = tl.arange(0, KV_BLOCK)[:, None]
    kv_at = kv_heads * HEAD_DIM + i[None, :]
    kv_inside = (kv_heads < KV_HEADS) & (i < HEAD_DIM)[None, :]
    return row, place, heads, is_head, at, inside, kv_at, kv_inside


@triton.jit
def _load(pointers, inside):
    """Load values in float32, zeros outside."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["lse_stride"], do_not_specialize_on_alignment=["places"])
def _merge_kernel(
    query, keys, key_stride, values, value_stride, causal_out, causal_lse, lse_stride, places,
    out, lse, scale,
    HAS_PLACES: tl.constexpr,
    NUM_OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row: a running softmax that starts from step 0's result."""
    row, place, heads, is_head, at, inside, kv_at, kv_inside = _find(
        places, HAS_PLACES, GROUP, KV_HEADS, HEAD_DIM, GROUP_BLOCK, KV_BLOCK, DIM_BLOCK
    )

    q = _load(query + place * WIDTH + at, inside) * scale
    total = _load(causal_out + place * WIDTH + at, inside)
    largest = _load(causal_lse + heads * lse_stride + place, is_head)
    weight = tl.full([GROUP_BLOCK, KV_BLOCK], 1.0, dtype=tl.float32)
    for step in tl.static_range(NUM_OWN):
        k = _load(keys[step] + row * key_stride + kv_at, kv_inside)
        v = _load(values[step] + row * value_stride + kv_at, kv_inside)
        score = tl.sum(q * k[None, :, :], axis=2)
        new_largest = tl.maximum(largest, score)
        shrink = tl.exp(largest - new_largest)
        share = tl.exp(score - new_largest)
        total = total * shrink[:, :, None] + share[:, :, None] * v[None, :, :]
        weight = weight * shrink + share
        largest = new_largest
    merged = total / weight[:, :, None]
    tl.store(out + row * WIDTH + at, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row * GROUP * KV_HEADS + heads, largest + tl.log(weight), mask=is_head)


@triton.jit(do_not_specialize_on_alignment=["places"])
def _merge_backward_kernel(
    query, keys, key_stride, values, value_stride, out, lse, grad_out, grad_causal, places,
    grad_query, grad_keys, grad_values, scale,
    HAS_PLACES: tl.constexpr,
    NUM_OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row; the gradient of a softmax weight is p (do.v - Delta)."""
    row, place, heads, is_head, at, inside, kv_at, kv_inside = _find(
        places, HAS_PLACES, GROUP, KV_HEADS, HEAD_DIM, GROUP_BLOCK, KV_BLOCK, DIM_BLOCK
    )

    q = _load(query + place * WIDTH + at, inside)
    do = _load(grad_out + row * WIDTH + at, inside)
    o = _load(out + row * WIDTH + at, inside)
    joint = _load(lse + row * GROUP * KV_HEADS + heads, is_head)
    delta = tl.sum(o * do, axis=2)
    dq = _load(grad_causal + place * WIDTH + at, inside)
    for step in tl.static_range(NUM_OWN):
        k = _load(keys[step] + row * key_stride + kv_at, kv_inside)
        v = _load(values[step] + row * value_stride + kv_at, kv_inside)
        p = tl.where(is_head, tl.exp(tl.sum(q * k[None, :, :], axis=2) * scale - joint), 0.0)
        ds = p * (tl.sum(do * v[None, :, :], axis=2) - delta) * scale
        dq += ds[:, :, None] * k[None, :, :]
        dk = tl.sum(ds[:, :, None] * q, axis=0).to(grad_query.dtype.element_ty)
        dv = tl.sum(p[:, :, None] * do, axis=0).to(grad_query.dtype.element_ty)
        grad_at = row * KV_HEADS * HEAD_DIM + kv_at
        tl.store(grad_keys[step] + grad_at, dk, mask=kv_inside)
        tl.store(grad_values[step] + grad_at, dv, mask=kv_inside)
    dq = dq.to(grad_query.dtype.element_ty)
    tl.store(grad_query + place * WIDTH + at, dq, mask=inside)
