"""The positions that each prediction of a chain is scored at, and its counters.

Prediction k at position i is scored against the verifier's distribution of position i+k, if that is
in the same document and supervised: TTT step k of EAGLE-3 (arXiv 2503.01840, section 3.2), token k
of a block.
"""

import numpy as np
import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import Ratio, StepSums
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.spans import document_bounds

# A chain is a position whose targets 0..k are all supervised and in the document.
COUNTERS = (
    "losses",  # float32, in nats, without weights
    "num_scored",  # positions of the loss
    "num_agreed",  # of these, the draft's token is the verifier's
    "num_chains",
    "num_open_chains",  # chains whose steps 0..k-1 all agreed
    "num_agreed_chains",  # chains whose steps 0..k all agreed
)
RATIOS = (
    Ratio("loss", "losses", "num_scored"),
    Ratio("full_acc", "num_agreed", "num_scored"),
    Ratio("cond_acc", "num_agreed_chains", "num_open_chains"),
    Ratio("acceptance_rate", "num_agreed_chains", "num_chains"),
)


def shifted(
    x: Tensor,  # [seq_len, ...]
    step: int,
) -> Tensor:
    """Row i holds row i+step of `x`; the last row is repeated past the end."""
    index = torch.arange(x.shape[0], device=x.device).add_(step).clamp_(max=x.shape[0] - 1)
    return x[index]


def scored_positions(
    loss_mask: Tensor,  # [seq_len], bool
    document_ids: Tensor,  # [seq_len], int64, -1 is padding
    num_steps: int,
    *,
    depths: Tensor | None = None,  # [seq_len], int64: steps that a position goes through
) -> Tensor:
    """Where each TTT step's target is supervised and in the document; [steps, seq_len], bool."""
    seq_len = loss_mask.shape[0]
    scored = loss_mask.new_zeros(num_steps, seq_len)
    for step in range(min(num_steps, seq_len)):
        stop = seq_len - step
        same_document = document_ids[:stop] == document_ids[step:]
        scored[step, :stop] = loss_mask[step:] & same_document & (document_ids[:stop] >= 0)
    if depths is not None:
        scored &= torch.arange(num_steps, device=depths.device)[:, None] < depths
    return scored


def scored_on_host(batch: Batch, num_steps: int) -> Tensor:
    """The same from what the host knows of a batch, before documents are dropped on the device."""
    bounds = document_bounds(batch.lengths, len(batch.host_mask))
    documents = torch.from_numpy(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)))
    return scored_positions(batch.host_mask, documents, num_steps, depths=batch.depths)


def weigh_as_one_mean(
    loss_weights: Tensor,  # [predictions], float32
    num_scored: Tensor,  # [predictions], int64
) -> Tensor:
    """What a scored prediction weighs if the loss is one weighted mean over all of them."""
    return loss_weights / (loss_weights * num_scored).sum().clamp(min=1e-12)


def sum_steps(
    losses: Tensor,  # [steps, seq_len], float32
    agreed: Tensor,  # [steps, seq_len], bool: the draft's token is the verifier's
    scored: Tensor,  # [steps, seq_len], bool
    weights: Tensor | None = None,  # [steps]: weight of a position of each step in the loss
) -> StepSums:
    """Sum the results of the TTT steps."""
    losses = losses.masked_fill(~scored, 0.0).sum(-1)
    chains = _all_so_far(scored)
    agreed_chains = _all_so_far(scored & agreed)
    # Step 0 has no step before it: every chain is open.
    before = torch.cat([torch.ones_like(agreed[:1]), agreed_chains[:-1]])
    sums = (
        losses,
        scored.sum(-1),
        (scored & agreed).sum(-1),
        chains.sum(-1),
        (chains & before).sum(-1),
        agreed_chains.sum(-1),
    )
    return StepSums(
        loss=(losses if weights is None else losses * weights).sum(),
        counters=dict(zip(COUNTERS, sums, strict=True)),
    )


def _all_so_far(x: Tensor) -> Tensor:
    """Whether steps 0..k all hold, for each k; [steps, seq_len], bool."""
    return x.int().cumprod(0).bool()
