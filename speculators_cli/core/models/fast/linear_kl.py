r"""lm_head and KL together, over the scored positions of all TTT steps, a few at a time.

For a target with verifier logits :math:`t`, and the draft's logits :math:`d` of one step,
:math:`p = softmax(t)`, :math:`q = softmax(d)`, the loss is
:math:`KL(p || q) = (E_p[t] - lse(t)) - (E_p[d] - lse(d))` and its gradient with respect to
:math:`d` is :math:`q - p`. No logits outlive their chunk: gradients are made in the forward, where
the draft's logits are overwritten by theirs. All TTT steps that score a target share its verifier
logits, computed once.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.models.cost import chunk_size
from speculators_cli.core.models.fast.rows import put_rows
from speculators_cli.core.models.fast.shared import SharedWeight
from speculators_cli.core.models.verifier import FrozenVerifier


class Scores(NamedTuple):
    """What each TTT step makes of each target."""

    loss: Tensor  # float32 scalar: weighted sum; carries the gradient
    losses: Tensor  # [steps, targets], float32, in nats; 0 where the step does not score it
    tokens: Tensor  # [steps, targets], int32: the draft's best draft id
    verifier_tokens: Tensor  # [targets], int32: the verifier's best within the draft vocabulary


def linear_kl(
    hidden: Tensor,  # [rows, hidden]: after the final norm, all TTT steps below each other
    head: SharedWeight,  # [draft_vocab, hidden]
    rows: Tensor,  # [steps, targets], int64: the row that scores a target; -1: none
    weights: Tensor,  # [steps], float32: what a position of each step weighs in the loss
    last_hidden: Tensor,  # [targets, hidden]: the verifier's, after its final norm
    verifier: FrozenVerifier,
    verifier_rows: Tensor,  # [draft_vocab, hidden]: the verifier's head
) -> Scores:
    """Score all targets.

    The gradient is made in the forward, for a gradient of 1 at `loss`: weigh by `weights`.
    """
    return Scores(
        *_LinearKL.apply(
            hidden, head.token, head, rows, weights, last_hidden, verifier, verifier_rows
        )
    )


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        token: Tensor,
        head: SharedWeight,
        rows: Tensor,
        weights: Tensor,
        last_hidden: Tensor,
        verifier: FrozenVerifier,
        verifier_rows: Tensor,
    ) -> tuple[Tensor, ...]:
        del token
        num_steps, num_targets = rows.shape
        losses = torch.zeros(num_steps, num_targets, device=hidden.device)
        tokens = torch.zeros(num_steps, num_targets, dtype=torch.int32, device=hidden.device)
        verifier_tokens = torch.zeros(num_targets, dtype=torch.int32, device=hidden.device)
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        verifier_rows = verifier_rows.to(hidden.dtype)
        for chunk in _chunks(num_targets, chunk_size(num_steps, len(verifier_rows))):
            here = slice(*chunk)
            targets = last_hidden[here] @ verifier_rows.T
            stats, verifier_tokens[here] = _target_stats(targets, verifier)
            own_rows = rows[:, here].contiguous()
            source = hidden.index_select(0, own_rows.clamp(min=0).flatten())
            logits = source @ head.value.T
            losses[:, here], tokens[:, here] = _kl(
                logits, targets, stats, own_rows, weights, verifier
            )
            if grad_hidden is not None:
                put_rows(logits @ head.value, own_rows.flatten(), grad_hidden, add=False)
            if needs_head:
                head.gradient.add_product(logits, source)
            # Before the next chunk's are made, or both would be there at once.
            del logits, targets, source
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(losses, tokens, verifier_tokens)
        return (losses.sum(-1) * weights).sum(), losses, tokens, verifier_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        torch._assert_async(grads[0] == 1.0)  # noqa: SLF001
        return (grad_hidden, *(None,) * 7)


def _chunks(num_targets: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` targets, of nearly equal lengths."""
    num_chunks = -(-num_targets // size)
    bounds = [num_targets * i // max(num_chunks, 1) for i in range(num_chunks + 1)]
    return list(pairwise(bounds))


def _logit_options(verifier: FrozenVerifier) -> dict[str, Any]:
    softcap = verifier.config.logit_softcap
    return {
        "logit_scale": verifier.config.logit_scale,
        "softcap": softcap or 1.0,
        "HAS_SOFTCAP": softcap is not None,
    }


def _blocks(vocab_size: int) -> dict[str, int]:
    return {"BLOCK": min(8192, triton.next_power_of_2(vocab_size)), "num_warps": 8}


def _target_stats(
    logits: Tensor,  # [targets, draft_vocab]: of the verifier, before scale and soft cap
    verifier: FrozenVerifier,
) -> tuple[Tensor, Tensor]:
    """log-sum-exp and mean logit, [targets, 2], float32; best token, [targets], int32."""
    num_targets, vocab_size = logits.shape
    stats = torch.empty(num_targets, 2, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_targets, dtype=torch.int32, device=logits.device)
    _target_stats_kernel[(num_targets,)](
        logits, stats, tokens, vocab_size, **_logit_options(verifier), **_blocks(vocab_size)
    )
    return stats, tokens


def _kl(
    logits: Tensor,  # [steps*targets, draft_vocab]: of the draft; becomes the weighted gradient
    target_logits: Tensor,  # [targets, draft_vocab]
    stats: Tensor,  # [targets, 2]
    rows: Tensor,  # [steps, targets], int64; -1: not scored
    weights: Tensor,  # [steps]
    verifier: FrozenVerifier,
) -> tuple[Tensor, Tensor]:
    """Losses, [steps, targets], float32; the draft's tokens, [steps, targets], int32."""
    num_steps, num_targets = rows.shape
    losses = torch.empty(num_steps, num_targets, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_steps, num_targets, dtype=torch.int32, device=logits.device)
    vocab_size = logits.shape[1]
    _kl_kernel[(num_steps * num_targets,)](
        logits, target_logits, stats, rows, weights, losses, tokens,
        num_steps, num_targets, vocab_size,
        **_logit_options(verifier), **_blocks(vocab_size),
    )  # fmt: skip
    return losses, tokens


@triton.jit
def _verifier_logits(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    x = x.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # softcap * tanh(x / softcap)
    return x


@triton.jit(do_not_specialize=["logit_scale", "softcap"])
def _target_stats_kernel(
    logits, stats, tokens, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One target: running log-sum-exp, mean and best of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    largest = -float("inf")
    weight = 0.0
    total = 0.0
    best = -1
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < vocab_size
        x = tl.load(logits + i, mask=inside, other=0.0)
        x = _verifier_logits(x, logit_scale, softcap, HAS_SOFTCAP)
        bounded = tl.where(inside, x, -float("inf"))
        here = tl.max(bounded)
        best = tl.where(here > largest, start + tl.argmax(bounded, axis=0), best)
        new_largest = tl.maximum(largest, here)
        shrink = tl.exp(largest - new_largest)
        share = tl.exp(bounded - new_largest)
        weight = weight * shrink + tl.sum(share)
        total = total * shrink + tl.sum(share * x)
        largest = new_largest
    tl.store(stats + row * 2, largest + tl.log(weight))
    tl.store(stats + row * 2 + 1, total / weight)
    tl.store(tokens + row, best)


@triton.jit(do_not_specialize=["num_steps", "num_targets", "logit_scale", "softcap"])
def _kl_kernel(
    logits, target_logits, stats, rows, weights, losses, tokens,
    num_steps, num_targets, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step and target: a pass for the loss, a pass that writes the gradient."""
    pair = tl.program_id(0).to(tl.int64)
    # Neighbours share a target, whose logits then come from the cache.
    target = pair // num_steps
    step = pair % num_steps
    pair = step * num_targets + target
    logits += pair * vocab_size
    target_logits += target * vocab_size
    if tl.load(rows + pair) < 0:
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            nothing = tl.zeros([BLOCK], dtype=tl.float32).to(logits.dtype.element_ty)
            tl.store(logits + i, nothing, mask=i < vocab_size)
        tl.store(losses + pair, 0.0)
        tl.store(tokens + pair, 0)
    else:
        target_lse = tl.load(stats + target * 2)
        target_mean = tl.load(stats + target * 2 + 1)
        largest = -float("inf")
        weight = 0.0
        mean = 0.0  # of the draft's logits under the verifier's distribution
        best = -1
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < vocab_size
            d = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(target_logits + i, mask=inside, other=0.0)
            t = _verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
            mean += tl.sum(tl.where(inside, tl.exp(t - target_lse) * d, 0.0))
            d = tl.where(inside, d, -float("inf"))
            here = tl.max(d)
            best = tl.where(here > largest, start + tl.argmax(d, axis=0), best)
            new_largest = tl.maximum(largest, here)
            weight = weight * tl.exp(largest - new_largest) + tl.sum(tl.exp(d - new_largest))
            largest = new_largest
        lse = largest + tl.log(weight)
        tl.store(losses + pair, (target_mean - target_lse) - (mean - lse))
        tl.store(tokens + pair, best)
        scale = tl.load(weights + step)
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < vocab_size
            d = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(target_logits + i, mask=inside, other=0.0)
            t = _verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
            grad = scale * (tl.exp(d - lse) - tl.exp(t - target_lse))
            tl.store(logits + i, grad.to(logits.dtype.element_ty), mask=inside)
