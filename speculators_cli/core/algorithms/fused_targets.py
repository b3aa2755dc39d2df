"""The verifier's side of a loss that is fused with the LM head."""

import torch
from torch import Tensor

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.linear_kl import Targets
from speculators_cli.core.kernels.rms_norm import rms_norm
from speculators_cli.core.models.verifier import FrozenVerifier


def find_targets(
    batch: Batch,
    verifier: FrozenVerifier,
    head: Tensor,  # [draft_vocab, hidden]: the verifier's LM head over the draft vocabulary
    kept_ids: Tensor,  # [draft_vocab], int64
    *,
    over_whole_vocab: bool,
) -> Targets:
    """What the draft is scored against, with the verifier's tokens over the chosen vocabulary."""
    last_hidden = batch.last_hidden_states
    if verifier.has_rms_norm:
        normed, _ = rms_norm(last_hidden, verifier.norm_weight, verifier.config.rms_norm_eps)
        last_hidden = torch.where(batch.is_normed[:, None], last_hidden, normed)
    else:
        last_hidden = verifier.normed(last_hidden, batch.is_normed)
    return Targets(
        hidden=last_hidden,
        head=head,
        is_kept=batch.loss_mask[batch.targets],
        tokens=verifier.tokens(last_hidden) if over_whole_vocab else None,
        kept_ids=kept_ids,
        logit_scale=verifier.config.logit_scale,
        softcap=verifier.config.logit_softcap,
        bias=verifier.bias_of(kept_ids),
    )
