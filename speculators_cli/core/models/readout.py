"""Readout: how a verifier computes logits from its last hidden states."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """`softcap(scale * (head @ norm(x) + bias))`, with the names of its parts.

    Names are those of the modules in the family's own model.
    """

    embedding: str
    norm: str | None  # None: the norm has no weights
    head: str
    is_tied: bool  # whether the LM head is the embedding
    is_centred: bool  # LayerNorm: the mean is subtracted; else RMSNorm
    eps: float
    offset: float  # added by the norm to its stored weight
    scale: float
    softcap: float | None


def apply_norm(
    states: Tensor,  # [rows, hidden], float32
    weight: Tensor,  # [hidden]
    bias: Tensor | None,  # [hidden]
    eps: float,
    *,
    is_centred: bool,
) -> Tensor:
    """Apply RMSNorm, or LayerNorm, which subtracts the mean; [rows, hidden]."""
    if is_centred:
        return F.layer_norm(states, weight.shape, weight, bias, eps)
    normed = F.rms_norm(states, weight.shape, weight, eps)
    return normed if bias is None else normed + bias


def apply_logit_options(logits: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """Scale, then squash to (-softcap, softcap)."""
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
