"""Losses: divergence of the draft's distribution from the verifier's, per position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def kl_loss(
    draft_logits: Tensor,  # [seq_len, draft_vocab], any float dtype
    verifier_log_probs: Tensor,  # [seq_len, draft_vocab], float32
) -> Tensor:
    """Compute KL(verifier || draft) of each position, in nats; [seq_len], float32."""
    draft_log_probs = draft_logits.float().log_softmax(-1)
    per_token = F.kl_div(draft_log_probs, verifier_log_probs, log_target=True, reduction="none")
    return per_token.sum(-1)


def ce_loss(
    draft_logits: Tensor,  # [..., draft_vocab], any float dtype
    verifier_log_probs: Tensor,  # [..., draft_vocab], float32
) -> Tensor:
    """Compute the cross-entropy with the verifier's top-1 token, in nats; [...], float32."""
    tokens = verifier_log_probs.argmax(-1, keepdim=True)
    return -draft_logits.float().log_softmax(-1).gather(-1, tokens).squeeze(-1)


def tv_loss(
    draft_logits: Tensor,  # [..., draft_vocab], any float dtype
    verifier_log_probs: Tensor,  # [..., draft_vocab], float32
) -> Tensor:
    """Compute the total variation distance, from 0 to 1; [...], float32.

    It is the probability that sampling rejects a draft token.
    """
    return 0.5 * (draft_logits.float().softmax(-1) - verifier_log_probs.exp()).abs().sum(-1)


@dataclass(frozen=True)
class Loss:
    """One loss, and whether a fused kernel computes it together with the LM head."""

    name: str
    plain: Callable[[Tensor, Tensor], Tensor]
    has_fused_kernel: bool


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("kl", kl_loss, has_fused_kernel=True),
        Loss("ce", ce_loss, has_fused_kernel=False),
        Loss("tv", tv_loss, has_fused_kernel=False),
    )
}
