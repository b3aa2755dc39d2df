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


@dataclass(frozen=True)
class Loss:
    """One loss, and whether a fused kernel computes it together with the LM head."""

    name: str
    plain: Callable[[Tensor, Tensor], Tensor]
    has_fused_kernel: bool


LOSSES = {loss.name: loss for loss in (Loss("kl", kl_loss, has_fused_kernel=True),)}
