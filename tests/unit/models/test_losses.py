"""Losses against their definitions."""

import pytest
import torch

from speculators_cli.core.models.losses import kl_loss

# bfloat16 keeps 8 bits: rounding every logit moves a term by about 1e-2.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_kl_loss_matches_its_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    draft, verifier = torch.randn(2, 7, 13, dtype=torch.float64)

    loss = kl_loss(draft.to(dtype), verifier.float().log_softmax(-1))

    p, q = verifier.softmax(-1), draft.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=RTOL[dtype], atol=1e-6)
    assert loss.dtype == torch.float32


def test_kl_gradient_near_convergence_is_exact_in_float32() -> None:
    # Trap: bfloat16 KL is off by percents where both distributions nearly agree.
    torch.manual_seed(1)
    verifier = torch.randn(5, 17)
    draft = (verifier + 1e-2 * torch.randn(5, 17)).requires_grad_()

    kl_loss(draft, verifier.log_softmax(-1)).sum().backward()

    expected = draft.detach().double().softmax(-1) - verifier.double().softmax(-1)
    # The gradient is a difference of numbers near 1/17, each with 24 bits.
    torch.testing.assert_close(draft.grad, expected.float(), rtol=1e-3, atol=1e-7)


def test_half_precision_logits_are_compared_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator).bfloat16()
    target = (logits.float() + 0.01 * torch.randn(5, 300, generator=generator)).log_softmax(-1)

    loss = kl_loss(logits, target)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_loss(logits.double().float(), target), rtol=0, atol=0)
    exact = (target.exp() * (target - logits.double().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-2, atol=1e-7)
