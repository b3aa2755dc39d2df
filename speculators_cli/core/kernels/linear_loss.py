r"""LM head and a weighted sum of losses, fused over the predictions of blocks, a chunk at a time.

The draft's logits :math:`d` are a sum of products: of the LM head, and of what an algorithm adds.
With the verifier's logits :math:`t` and its token :math:`y`, :math:`p = softmax(t)`,
:math:`q = softmax(d)`, the losses and their gradients with respect to :math:`d_i` are

======================  =====================================  ================================
KL(p || q)              E_p[t] - lse(t) - E_p[d] + lse(d)      q_i - p_i
cross-entropy           lse(d) - d_y                           q_i - [i = y]
total variation         1/2 sum |q - p|                        1/2 q_i (s_i - sum_j q_j s_j)
======================  =====================================  ================================

with :math:`s = sign(q - p)`. As in `linear_kl`, gradients are computed in the forward and overwrite
the logits. The weight of a prediction may depend on the losses of its block, so all losses of a
chunk are known before its gradients are computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.linear_kl import (
    Targets,
    logit_options,
    score_logits,
    target_stats,
    verifier_logits,
    vocab_blocks,
)
from speculators_cli.core.kernels.logit_chunks import block_chunk_size, split_rows
from speculators_cli.core.kernels.shared import SharedWeight


class Mix(NamedTuple):
    """Weights of the losses of a prediction."""

    kl: float = 0.0
    ce: float = 0.0
    tv: float = 0.0


# Losses of some blocks, and where they are scored -> weights; each [blocks, predictions].
Weigh = Callable[[Tensor, Tensor], Tensor]


class BlockScores(NamedTuple):
    """The scores of each prediction; the loss carries the gradient."""

    loss: Tensor  # float32 scalar: weighted sum
    losses: Tensor  # [blocks, predictions], float32: mixed, in nats; 0 where nothing is scored
    distances: Tensor  # the same, total variation
    agreed: Tensor  # the draft's token equals the verifier's
    scored: Tensor  # [blocks, predictions], bool


def linear_loss(
    products: Sequence[tuple[Tensor, SharedWeight]],  # [blocks, predictions, in]; [draft_vocab, in]
    indices: Tensor,  # [blocks, predictions], int64: the target that is scored, or -1
    bounds: Callable[[int, int], tuple[int, int]],  # of blocks -> of all targets they score
    weigh: Weigh,
    mix: Mix,
    targets: Targets,
) -> BlockScores:
    """Score all predictions of all blocks.

    The gradient is computed in the forward, for a gradient of 1 at `loss`: scale with `weigh`.
    """
    inputs, weights = zip(*products, strict=True)
    tokens = [weight.token for weight in weights]
    return BlockScores(
        *_LinearLoss.apply(weights, indices, bounds, weigh, mix, targets, *tokens, *inputs)
    )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Sequence[SharedWeight],
        indices: Tensor,
        bounds: Callable[[int, int], tuple[int, int]],
        weigh: Weigh,
        mix: Mix,
        targets: Targets,
        *tokens_and_inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        num_products = len(weights)
        needs = ctx.needs_input_grad[6:]
        inputs = [x.contiguous() for x in tokens_and_inputs[num_products:]]
        grads = [
            torch.empty_like(x) if needed else None
            for x, needed in zip(inputs, needs[num_products:], strict=True)
        ]
        dtype, device = inputs[0].dtype, inputs[0].device
        losses, distances = (torch.zeros(indices.shape, device=device) for _ in range(2))
        flags = torch.zeros(2, *indices.shape, dtype=torch.bool, device=device)
        total = torch.zeros((), device=device)
        head = targets.head.to(dtype)
        bias = None if targets.bias is None else targets.bias.to(dtype)
        num_blocks, num_predictions = indices.shape
        for start, stop in split_rows(num_blocks, block_chunk_size(num_predictions, len(head))):
            here = slice(start, stop)
            sources = [x[here].view(-1, x.shape[-1]) for x in inputs]
            factors = [weight.factor for weight in weights]
            rows = [factor.prepare(x) for factor, x in zip(factors, sources, strict=True)]
            logits = factors[0].multiply(rows[0])
            for factor, x in zip(factors[1:], rows[1:], strict=True):
                logits = factor.multiply(x, add=logits)
            first, last = bounds(start, stop)
            chunk = _Chunk(
                logits,
                F.linear(targets.hidden[first:last], head, bias),
                indices[here],
                slice(first, last),
                targets,
                mix,
            )
            chunk.score(losses[here], distances[here], flags[0, here], flags[1, here])
            chunk_weights = weigh(losses[here], flags[1, here]).expand(stop - start, -1)
            total += (losses[here] * chunk_weights).sum()
            chunk.differentiate(chunk_weights.contiguous(), flags[1, here])
            # Once for all factors of a kind.
            kinds = {type(factor): factor for factor in factors}
            prepared = {kind: factor.prepare(logits) for kind, factor in kinds.items()}
            for factor, x, grad, needs_weight in zip(
                factors, rows, grads, needs[:num_products], strict=True
            ):
                grad_rows = prepared[type(factor)]
                if needs_weight:
                    factor.add_gradient(grad_rows, x)
                if grad is not None:
                    factor.multiply_back(grad_rows, into=grad[here].view(-1, grad.shape[-1]))
            # Before the next chunk's are computed, or both would be in memory at once.
            del logits, prepared, grad_rows, chunk
        ctx.save_for_backward(*grads)
        ctx.num_products = num_products
        agreed, scored = flags.unbind()
        ctx.mark_non_differentiable(losses, distances, agreed, scored)
        return total, losses, distances, agreed, scored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        torch._assert_async(grads[0] == 1.0)  # noqa: SLF001
        return (*(None,) * (6 + ctx.num_products), *ctx.saved_tensors)


class _Chunk:
    """The logits of some blocks, and of the targets they score.

    Args:
        logits: [pairs, draft_vocab]: of the draft; becomes the gradient.
        target_logits: [some, draft_vocab]: of the verifier, before scale and soft cap.
        indices: [blocks, predictions], int64.
        here: The range of these targets.
        targets: All of them.
        mix: Of the losses.
    """

    def __init__(
        self,
        logits: Tensor,
        target_logits: Tensor,
        indices: Tensor,
        here: slice,
        targets: Targets,
        mix: Mix,
    ) -> None:
        self.logits, self.target_logits, self.indices = logits, target_logits, indices
        self.here, self.targets, self.mix = here, targets, mix
        draft_ids = torch.arange(len(targets.kept_ids), device=logits.device)
        # Its tokens as draft ids, which index logits.
        self.stats, self.best = target_stats(
            target_logits, replace(targets, kept_ids=draft_ids, tokens=None), here
        )
        self.known = torch.empty(len(logits), 2, dtype=torch.float32, device=logits.device)
        self.options = {
            **logit_options(targets),
            **vocab_blocks(logits.shape[1]),
        }

    def score(self, losses: Tensor, distances: Tensor, agreed: Tensor, scored: Tensor) -> None:
        """Write what is known of each pair; each [blocks, predictions]."""
        own, targets = self.targets.tokens, self.targets
        tokens = targets.kept_ids[self.best] if own is None else own[self.here]
        launch(_score_kernel, (len(self.logits),))(
            self.logits, self.target_logits, self.stats, self.best, tokens, self.indices,
            self.here.start, targets.is_kept, targets.kept_ids, *self.mix,
            losses, distances, agreed, scored, self.known, self.logits.shape[1], **self.options,
        )  # fmt: skip

    def differentiate(
        self,
        weights: Tensor,  # [blocks, predictions], float32
        scored: Tensor,
    ) -> None:
        """Replace the logits by the gradient."""
        launch(_gradient_kernel, (len(self.logits),))(
            self.logits, self.target_logits, self.stats, self.best, self.indices,
            self.here.start, *self.mix, weights, scored, self.known, self.logits.shape[1],
            HAS_KL=self.mix.kl != 0, HAS_CE=self.mix.ce != 0, HAS_TV=self.mix.tv != 0,
            **self.options,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["first", "kl", "ce", "tv", "logit_scale", "softcap"],
    do_not_specialize_on_alignment=[
        "tokens", "indices", "losses", "distances", "agreed", "scored", "known",
    ],
)  # fmt: skip
def _score_kernel(
    logits, target_logits, stats, best, tokens, indices, first, is_kept, kept_ids, kl, ce, tv,
    losses, distances, agreed, scored, known, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one pair: a pass for the log-sum-exp, one for the distance."""
    pair = tl.program_id(0).to(tl.int64)
    logits += pair * vocab_size
    target = tl.load(indices + pair)
    is_scored = tl.load(is_kept + target, mask=target >= 0, other=0) != 0
    tl.store(scored + pair, is_scored)
    if is_scored:
        target -= first
        target_logits += target * vocab_size
        target_lse = tl.load(stats + target * 2)
        target_mean = tl.load(stats + target * 2 + 1)
        lse, mean, own = score_logits(
            logits, target_logits, target_lse, vocab_size, logit_scale, softcap, HAS_SOFTCAP, BLOCK
        )
        distance = 0.0
        mean_sign = 0.0  # of q - p under the draft's distribution
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < vocab_size
            d = tl.load(logits + i, mask=inside, other=-float("inf")).to(tl.float32)
            t = tl.load(target_logits + i, mask=inside, other=0.0)
            t = verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
            q = tl.exp(d - lse)
            p = tl.where(inside, tl.exp(t - target_lse), 0.0)
            distance += tl.sum(tl.abs(q - p)) * 0.5
            mean_sign += tl.sum(tl.where(q > p, q, 0.0)) - tl.sum(tl.where(q < p, q, 0.0))
        tl.store(known + pair * 2, lse)
        tl.store(known + pair * 2 + 1, mean_sign)
        divergence = (target_mean - target_lse) - (mean - lse)
        entropy = lse - tl.load(logits + tl.load(best + target)).to(tl.float32)
        tl.store(losses + pair, kl * divergence + ce * entropy + tv * distance)
        tl.store(distances + pair, distance)
        token = tl.load(kept_ids + tl.maximum(own, 0))
        tl.store(agreed + pair, token == tl.load(tokens + target))


@triton.jit(
    do_not_specialize=["first", "kl", "ce", "tv", "logit_scale", "softcap"],
    do_not_specialize_on_alignment=["indices", "weights", "scored", "known"],
)
def _gradient_kernel(
    logits, target_logits, stats, best, indices, first, kl, ce, tv, weights, scored, known,
    vocab_size, logit_scale, softcap,
    HAS_KL: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_TV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one pair: its logits become the gradient of its weighted loss."""
    pair = tl.program_id(0).to(tl.int64)
    logits += pair * vocab_size
    is_scored = tl.load(scored + pair) != 0
    target = tl.where(is_scored, tl.load(indices + pair) - first, 0)
    target_logits += target * vocab_size
    # A batch may have no targets.
    target_lse = tl.load(stats + target * 2, mask=is_scored, other=0.0)
    token = tl.load(best + target, mask=is_scored, other=0)
    lse = tl.load(known + pair * 2)
    mean_sign = tl.load(known + pair * 2 + 1)
    scale = tl.load(weights + pair)
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < vocab_size
        grad = tl.zeros([BLOCK], dtype=tl.float32)
        if is_scored:
            d = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(target_logits + i, mask=inside, other=0.0)
            t = verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
            q = tl.exp(d - lse)
            p = tl.exp(t - target_lse)
            if HAS_KL:
                grad += kl * (q - p)
            if HAS_CE:
                grad += ce * (q - tl.where(i == token, 1.0, 0.0))
            if HAS_TV:
                sign = tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0)
                grad += tv * 0.5 * q * (sign - mean_sign)
            grad = grad * scale
        tl.store(logits + i, grad.to(logits.dtype.element_ty), mask=inside)
