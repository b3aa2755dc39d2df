r"""LM head and KL divergence, fused over the rows of all TTT steps, one chunk at a time.

For a target with verifier logits :math:`t`, and the draft's logits :math:`d` of one step,
:math:`p = softmax(t)`, :math:`q = softmax(d)`, the loss is
:math:`KL(p || q) = (E_p[t] - lse(t)) - (E_p[d] - lse(d))` and its gradient with respect to
:math:`d` is :math:`q - p`. No logits outlive their chunk: gradients are computed in the forward,
where they overwrite the draft's logits. The steps of a row are scored together: a chunk is one
matrix product, and steps that score a target share its verifier logits, computed once per chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from speculators_cli.core.kernels.launch import launch
from speculators_cli.core.kernels.logit_chunks import Pairs, chunk_size
from speculators_cli.core.kernels.shared import SharedWeight


@dataclass(frozen=True)
class Targets:
    """The verifier's side of each target; a batch may have none."""

    hidden: Tensor  # [targets, hidden]: after its final norm
    head: Tensor  # the LM head's rows of the draft vocabulary
    is_kept: Tensor  # False where a document was excluded on the device
    tokens: Tensor | None  # verifier ids; None: its top-1 token of the draft vocabulary
    kept_ids: Tensor  # [draft_vocab], int64: the verifier ids of draft ids
    logit_scale: float
    softcap: float | None  # logits are squashed to (-softcap, softcap)
    bias: Tensor | None = None  # the LM head's bias, for its rows of the draft vocabulary


class Scores(NamedTuple):
    """The scores of each pair of a row and a step."""

    loss: Tensor  # float32 scalar: weighted sum; carries the gradient
    losses: Tensor  # [pairs], float32, in nats; 0 where nothing is scored
    agreed: Tensor  # [pairs], bool: the draft's token equals the verifier's
    scored: Tensor  # [pairs], bool


def linear_kl(
    stacked: Tensor,  # [pairs, hidden]: input shared with `parts`, without a gradient
    parts: Sequence[Tensor],  # of each of `pairs.inputs`, [rows, hidden]: after the final norm
    head: SharedWeight,  # [draft_vocab, hidden]
    pairs: Pairs,
    weights: Tensor,  # [steps]: weight of a position of each step in the loss
    targets: Targets,
) -> Scores:
    """Score all targets.

    The gradient is computed in the forward, for a gradient of 1 at `loss`: scale with `weights`.
    """
    return Scores(*_LinearKL.apply(stacked, head, pairs, weights, targets, head.token, *parts))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stacked: Tensor,
        head: SharedWeight,
        pairs: Pairs,
        weights: Tensor,
        targets: Targets,
        token: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        del token, parts
        needs_head, needs_rows = ctx.needs_input_grad[5], any(ctx.needs_input_grad[6:])
        weights = weights.index_select(0, pairs.steps)
        losses = torch.empty(len(weights), device=stacked.device)
        flags = torch.empty(2, len(weights), dtype=torch.bool, device=stacked.device)
        grads = torch.empty_like(stacked) if needs_rows else None
        verifier_head = targets.head.to(stacked.dtype)
        verifier_bias = None if targets.bias is None else targets.bias.to(stacked.dtype)
        size = pairs.num_steps * chunk_size(pairs.num_steps, len(verifier_head))
        for here, known in pairs.split(size):
            places = None if pairs.order is None else pairs.order[here]
            rows = head.factor.prepare(
                stacked[here] if places is None else stacked.index_select(0, places)
            )
            logits = head.factor.multiply(rows)
            target_logits = F.linear(targets.hidden[known], verifier_head, verifier_bias)
            _kl(
                logits,
                target_logits,
                target_stats(target_logits, targets, known),
                pairs.targets[here],
                known.start,
                weights[here],
                targets,
                (losses[here], flags[0, here], flags[1, here]),
            )
            if needs_rows or needs_head:
                grad_rows = head.factor.prepare(logits)
                if needs_head:
                    head.factor.add_gradient(grad_rows, rows)
                if grads is not None:
                    into = grads[here] if places is None else None
                    own = head.factor.multiply_back(grad_rows, into=into)
                    if places is not None:
                        grads.index_copy_(0, places, own)
                    del own
                del grad_rows
            # Before the next chunk's are computed, or both would be in memory at once.
            del rows, logits, target_logits
        ctx.save_for_backward(grads)
        ctx.inputs = pairs.inputs
        agreed, scored = flags.unbind()
        ctx.mark_non_differentiable(losses, agreed, scored)
        return (losses * weights).sum(), losses, agreed, scored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (input_grads,) = ctx.saved_tensors
        torch._assert_async(grads[0] == 1.0)  # noqa: SLF001
        return (*(None,) * 6, *(input_grads[rows] for rows in ctx.inputs))


def logit_options(targets: Targets) -> dict[str, Any]:
    """Return arguments of kernels that read the verifier's logits."""
    return {
        "logit_scale": targets.logit_scale,
        "softcap": targets.softcap or 1.0,
        "HAS_SOFTCAP": targets.softcap is not None,
    }


def vocab_blocks(vocab_size: int) -> dict[str, int]:
    """Return constants of kernels that go over a vocabulary."""
    return {"BLOCK": min(4096, triton.next_power_of_2(vocab_size)), "num_warps": 8}


def target_stats(
    logits: Tensor,  # [some, draft_vocab]: of the verifier, before scale and soft cap
    targets: Targets,
    here: slice,  # the range of these targets
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and mean logit, [some, 2], float32; the top-1 tokens, [some], int64."""
    num_targets, vocab_size = logits.shape
    stats = torch.empty(num_targets, 2, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_targets, dtype=torch.int64, device=logits.device)
    launch(_target_stats_kernel, (num_targets,))(
        logits, stats, best, targets.kept_ids, vocab_size,
        **logit_options(targets), **vocab_blocks(vocab_size),
    )  # fmt: skip
    return stats, best if targets.tokens is None else targets.tokens[here]


def _kl(
    logits: Tensor,  # [pairs, draft_vocab]: of the draft; becomes the weighted gradient
    target_logits: Tensor,  # [some, draft_vocab]
    known: tuple[Tensor, Tensor],  # of these targets, by `target_stats`
    indices: Tensor,  # [pairs], int64
    first: int,  # the first of these targets
    weights: Tensor,  # [pairs]
    targets: Targets,
    results: tuple[Tensor, Tensor, Tensor],  # losses, agreed and scored, each [pairs]
) -> None:
    """Write the losses and gradients of a chunk."""
    num_pairs, vocab_size = logits.shape
    launch(_kl_kernel, (num_pairs,))(
        logits, target_logits, *known, indices, first, targets.is_kept, targets.kept_ids, weights,
        *results, vocab_size,
        **logit_options(targets), **vocab_blocks(vocab_size),
    )  # fmt: skip


@triton.jit
def verifier_logits(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return logits in float32, after scale and soft cap."""
    x = x.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # softcap * tanh(x / softcap)
    return x


@triton.jit
def _go_on(x, start, inside, largest, weight, best):
    """Take a block of logits into the running maximum, sum of exponentials and top-1 id.

    Returns the three, what sums of before are multiplied by, and what each logit adds.
    """
    bounded = tl.where(inside, x, -float("inf"))
    here = tl.max(bounded)
    best = tl.where(here > largest, start + tl.argmax(bounded, axis=0), best)
    new_largest = tl.maximum(largest, here)
    shrink = tl.exp(largest - new_largest)
    share = tl.exp(bounded - new_largest)
    return new_largest, weight * shrink + tl.sum(share), best, shrink, share


@triton.jit(do_not_specialize=["logit_scale", "softcap"])
def _target_stats_kernel(
    logits, stats, tokens, kept_ids, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one target: running log-sum-exp, mean and maximum of its logits."""
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
        x = verifier_logits(x, logit_scale, softcap, HAS_SOFTCAP)
        largest, weight, best, shrink, share = _go_on(x, start, inside, largest, weight, best)
        total = total * shrink + tl.sum(share * x)
    tl.store(stats + row * 2, largest + tl.log(weight))
    tl.store(stats + row * 2 + 1, total / weight)
    # Where all logits are NaN, there is no maximum.
    tl.store(tokens + row, tl.load(kept_ids + tl.maximum(best, 0)))


@triton.jit
def score_logits(
    logits, target_logits, target_lse, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return log-sum-exp, mean under the verifier's distribution and top-1 id of draft logits."""
    largest = -float("inf")
    weight = 0.0
    mean = 0.0
    best = -1
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < vocab_size
        d = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(target_logits + i, mask=inside, other=0.0)
        t = verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
        mean += tl.sum(tl.where(inside, tl.exp(t - target_lse) * d, 0.0))
        largest, weight, best, _shrink, _share = _go_on(d, start, inside, largest, weight, best)
    return largest + tl.log(weight), mean, best


@triton.jit(
    do_not_specialize=["first", "logit_scale", "softcap"],
    do_not_specialize_on_alignment=["tokens", "indices", "weights", "losses", "agreed", "scored"],
)
def _kl_kernel(
    logits, target_logits, stats, tokens, indices, first, is_kept, kept_ids, weights,
    losses, agreed, scored, vocab_size, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one row and step: one pass for the loss, one that writes the gradient."""
    pair = tl.program_id(0).to(tl.int64)
    logits += pair * vocab_size
    target = tl.load(indices + pair)
    is_scored = tl.load(is_kept + target, mask=target >= 0, other=0) != 0
    tl.store(scored + pair, is_scored)
    if not is_scored:
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            nothing = tl.zeros([BLOCK], dtype=tl.float32).to(logits.dtype.element_ty)
            tl.store(logits + i, nothing, mask=i < vocab_size)
        tl.store(losses + pair, 0.0)
        tl.store(agreed + pair, False)
    else:
        target -= first
        target_logits += target * vocab_size
        target_lse = tl.load(stats + target * 2)
        target_mean = tl.load(stats + target * 2 + 1)
        lse, mean, best = score_logits(
            logits, target_logits, target_lse, vocab_size, logit_scale, softcap, HAS_SOFTCAP, BLOCK
        )
        tl.store(losses + pair, (target_mean - target_lse) - (mean - lse))
        token = tl.load(kept_ids + tl.maximum(best, 0))
        tl.store(agreed + pair, token == tl.load(tokens + target))
        scale = tl.load(weights + pair)
        for start in range(0, vocab_size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < vocab_size
            d = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(target_logits + i, mask=inside, other=0.0)
            t = verifier_logits(t, logit_scale, softcap, HAS_SOFTCAP)
            grad = scale * (tl.exp(d - lse) - tl.exp(t - target_lse))
            tl.store(logits + i, grad.to(logits.dtype.element_ty), mask=inside)
