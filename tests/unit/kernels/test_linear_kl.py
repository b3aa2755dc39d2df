"""lm_head and KL together, against logits written out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels.linear_kl import Targets, linear_kl
from speculators_cli.core.kernels.logit_chunks import Pairs
from speculators_cli.core.kernels.shared import SharedWeight
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.models.verifier import FrozenVerifier
from tests.gradients import ATOL, RTOL
from tests.tiny_drafts import filled_draft, make_config


def make_verifier(
    rng: torch.Generator, *, has_bias: bool = False, **changes: Any
) -> FrozenVerifier:
    draft = filled_draft(make_config(), rng, kept_ids=torch.arange(0, 37, 2))
    verifier = draft.verifier
    return FrozenVerifier(
        verifier.embedding,
        verifier.norm_weight,
        verifier.head,
        replace(verifier.config, **changes),
        head_bias=torch.randn(37, generator=rng) if has_bias else None,
    )


def targets_of(verifier: FrozenVerifier, hidden: Tensor, *, is_kept: Tensor) -> Targets:
    return Targets(
        hidden=hidden,
        head=verifier.head,
        is_kept=is_kept,
        tokens=None,
        kept_ids=torch.arange(len(verifier.head)),
        logit_scale=verifier.config.logit_scale,
        softcap=verifier.config.logit_softcap,
        bias=verifier.head_bias,
    )


def make_pairs(*, are_by_step: bool) -> Pairs:
    """Five rows of two steps, whose inputs are beside each other, or those of a step are."""
    # Target 2 was taken out.
    targets = torch.tensor([-1, 0, 0, 1, 1, -1, 2, 3, 3, 4])
    return Pairs(
        steps=torch.tensor([0, 1] * 5),
        targets=targets,
        order=torch.arange(10).view(2, 5).T.flatten() if are_by_step else None,
        inputs=(slice(5), slice(5, 10)) if are_by_step else (slice(0, None, 2), slice(1, None, 2)),
        num_steps=2,
        first=np.arange(0, 11, 2),
        target_bounds=(np.array([0, 0, 1, 2, 3]), np.array([1, 2, 3, 4, 5])),
    )


@pytest.mark.parametrize("are_by_step", [False, True])
@pytest.mark.parametrize("chunk", [100, 2])
@pytest.mark.parametrize(
    "options", [{}, {"logit_softcap": 2.0}, {"logit_scale": 0.3}, {"has_bias": True}], ids=str
)
def test_linear_kl_equals_the_plain_loss(
    options: dict[str, Any],
    chunk: int,
    are_by_step: bool,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("speculators_cli.core.kernels.logit_chunks.MAX_ROWS", chunk)
    verifier = make_verifier(rng, **options)
    first, second, last = (torch.randn(5, 24, generator=rng) for _ in range(3))
    head = torch.randn(37, 24, generator=rng)
    pairs = make_pairs(are_by_step=are_by_step)
    indices = pairs.targets.view(5, 2)
    is_kept = torch.tensor([True, True, False, True, True])
    scored = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    weights = torch.tensor([0.5, 2.0])
    log_probs = verifier.logits(last, verifier.head).log_softmax(-1)[indices.clamp(min=0)]

    def fast(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
        shared = SharedWeight([head], torch.float32)
        stacked = torch.stack([first, second], dim=1)
        inputs = torch.cat([first, second]) if are_by_step else stacked.flatten(0, 1)
        known = targets_of(verifier, last, is_kept=is_kept)
        scores = linear_kl(inputs.detach(), [first, second], shared, pairs, weights, known)
        assert torch.equal(scores.scored.view(5, 2), scored)
        agreed = (stacked @ head.T).argmax(-1) == log_probs.argmax(-1)
        assert torch.equal(scores.agreed.view(5, 2), agreed & scored)
        return scores.loss

    def plain(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
        losses = kl_loss(torch.stack([first, second], dim=1) @ head.T, log_probs)
        return (losses.masked_fill(~scored, 0.0).sum(0) * weights).sum()

    leaves = [[x.clone().requires_grad_() for x in (first, second, head)] for _ in range(2)]
    losses = [compute(*own) for compute, own in zip((fast, plain), leaves, strict=True)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=RTOL, atol=ATOL)
    for own, exact in zip(*leaves, strict=True):
        assert exact.grad is not None
        assert exact.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, exact.grad, rtol=RTOL, atol=ATOL)
