"""LM head and the losses of blocks together, against logits written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.loss_weights import weigh_by_acceptance
from speculators_cli.core.kernels.linear_loss import Mix, linear_loss
from speculators_cli.core.kernels.shared import SharedWeight
from speculators_cli.core.models.losses import ce_loss, kl_loss, tv_loss
from tests.gradients import ATOL, RTOL
from tests.unit.kernels.test_linear_kl import make_verifier, targets_of

MIXES = {
    "kl": Mix(kl=1.0),
    "ce": Mix(ce=1.0),
    "tv": Mix(tv=1.0),
    "all": Mix(kl=0.4, ce=0.1, tv=1.8),
}
# Three predictions of four blocks; target 2 was taken out.
INDICES = torch.tensor([[-1, 0, 1], [0, 1, -1], [1, 2, 3], [3, 4, -1]])
SCORED = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 0]]).bool()
IS_KEPT = torch.tensor([True, True, False, True, True])
BOUNDS = {(0, 4): (0, 5), (0, 2): (0, 2), (2, 4): (1, 5)}
DECAY = torch.tensor([1.0, 0.7, 0.4])


def plain_losses(logits: Tensor, log_probs: Tensor, mix: Mix) -> Tensor:
    parts = (kl_loss, ce_loss, tv_loss)
    return sum(
        (w * part(logits, log_probs) for w, part in zip(mix, parts, strict=True)),
        torch.zeros(logits.shape[:-1]),
    )


@pytest.mark.parametrize("chunk", [4, 2])
@pytest.mark.parametrize("weights", ["decay", "dpace"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 2.0, "has_bias": True}], ids=str)
def test_linear_loss_equals_the_plain_losses(
    options: dict[str, Any],
    mix: str,
    weights: str,
    chunk: int,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("speculators_cli.core.kernels.logit_chunks.MAX_LOGITS", chunk * 3 * 37)
    verifier = make_verifier(rng, **options)
    last = torch.randn(5, 24, generator=rng)
    leaves = [
        torch.randn(*shape, generator=rng) for shape in ((4, 3, 24), (4, 3, 6), (37, 24), (37, 6))
    ]
    log_probs = verifier.logits(last, verifier.head).log_softmax(-1)[INDICES.clamp(min=0)]

    def weigh(losses: Tensor, scored: Tensor) -> Tensor:
        return DECAY * (weigh_by_acceptance(losses, scored, 0.3) if weights == "dpace" else 1.0)

    def fast(hidden: Tensor, embedded: Tensor, head: Tensor, second: Tensor) -> Tensor:
        shared = [SharedWeight([x], torch.float32) for x in (head, second)]
        scores = linear_loss(
            list(zip((hidden, embedded), shared, strict=True)),
            INDICES,
            lambda start, stop: BOUNDS[start, stop],
            weigh,
            MIXES[mix],
            targets_of(verifier, last, is_kept=IS_KEPT),
        )
        logits = hidden @ head.T + embedded @ second.T
        assert torch.equal(scores.scored, SCORED)
        agreed = logits.argmax(-1) == log_probs.argmax(-1)
        assert torch.equal(scores.agreed, agreed & SCORED)
        exact = tv_loss(logits, log_probs).masked_fill(~SCORED, 0.0)
        torch.testing.assert_close(scores.distances, exact, rtol=RTOL, atol=ATOL)
        own = plain_losses(logits, log_probs, MIXES[mix]).masked_fill(~SCORED, 0.0)
        torch.testing.assert_close(scores.losses, own, rtol=RTOL, atol=ATOL)
        return scores.loss

    def plain(hidden: Tensor, embedded: Tensor, head: Tensor, second: Tensor) -> Tensor:
        losses = plain_losses(hidden @ head.T + embedded @ second.T, log_probs, MIXES[mix])
        losses = losses.masked_fill(~SCORED, 0.0)
        return (losses * weigh(losses.detach(), SCORED)).sum()

    found = []
    for compute in (fast, plain):
        own = [x.clone().requires_grad_() for x in leaves]
        loss = compute(*own)
        loss.backward()
        found.append((loss, *(x.grad for x in own)))
    for ours, exact in zip(*found, strict=True):
        assert ours is not None
        assert exact is not None
        assert exact.abs().max() > 0
        torch.testing.assert_close(ours, exact, rtol=RTOL, atol=ATOL)
