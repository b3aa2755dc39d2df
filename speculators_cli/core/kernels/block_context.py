"""Keys and values of the context in all layers: normalised and rotated at once, one gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.head_norm import HeadGroups, HeadNorm, Rope


class ContextGradient:
    """The gradient of what was projected, into which each layer writes its part, once."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads  # of keys and of values, in all layers
        self.total: Tensor | None = None  # none before the first layer's backward

    def of_layer(self, index: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Where the gradients of keys and values belong, each like `key`."""
        num_rows, num_heads, head_dim = key.shape
        if self.total is None:
            self.total = key.new_empty(num_rows, self.num_heads * head_dim)
        parts = self.total.view(num_rows, self.num_heads, head_dim).split(num_heads, dim=1)
        return parts[2 * index], parts[2 * index + 1]

    def take(self) -> Tensor:
        """The whole of it; [rows, layers*2*kv_heads*head_dim]."""
        total, self.total = self.total, None
        assert total is not None, "attention contributes to the loss"
        return total


@dataclass(frozen=True)
class LayerContext:
    """What one layer attends to."""

    key: Tensor  # [rows, kv_heads, head_dim], each row contiguous; normalised and rotated
    value: Tensor  # the same, as projected
    token: Tensor  # depends on both: as of `SharedWeight`
    gradient: ContextGradient
    index: int  # of the layer


def share_context(
    projected: Tensor,  # [rows, layers*2*kv_heads*head_dim]: keys, values of each layer
    gains: Tensor,  # [layers, head_dim], float32: weights of the norms of keys
    eps: float,
    rope: Rope,
    positions: Tensor,  # [rows], int64
) -> list[LayerContext]:
    """The context of each layer."""
    num_layers, head_dim = gains.shape
    num_heads = projected.shape[1] // (2 * num_layers * head_dim)
    groups = HeadGroups(num_heads, num_heads, num_layers, gap=num_heads)
    norm = HeadNorm(groups, gains, eps, rope, positions)
    gradient = ContextGradient(2 * num_layers * num_heads)
    keys = norm.apply(projected.detach())
    heads = projected.detach().view(len(projected), gradient.num_heads, head_dim)
    values = heads.split(num_heads, dim=1)[1::2]
    token: Tensor = _ShareContext.apply(projected, gains, norm, gradient)
    return [
        LayerContext(key, value, token, gradient, index)
        for index, (key, value) in enumerate(zip(keys, values, strict=True))
    ]


class _ShareContext(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, gains: Tensor, norm: HeadNorm, gradient: ContextGradient
    ) -> Tensor:
        del gains
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected)
        ctx.norm, ctx.gradient = norm, gradient
        return torch.empty((), device=projected.device)  # never read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        (projected,) = ctx.saved_tensors
        total = ctx.gradient.take()
        grad_gains = ctx.norm.differentiate(projected, total)
        return total, grad_gains, None, None
