"""What a training step costs: the operations a loss and its gradients need, and no others.

Counted as in the EAGLE-3 training step that computes only what reaches the loss: matrix products
at 2 operations a multiply-add, attention over the keys that a query sees. Norms, rotations and
activations are left out; they are a few operations a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.ttt import scored_positions


@dataclass(frozen=True)
class RowCounts:
    """How many rows of a packed sequence what part of a step works on."""

    num_positions: int  # of documents
    num_active: int  # are scored in some TTT step
    num_needed: int  # are read as some active position's token
    num_targets: int  # supervised
    num_pairs: int  # of an active row and a key it sees in step 0
    num_all_pairs: int  # of any position and a key it sees


def count_rows(
    loss_mask: Tensor,  # [seq_len], bool, on the CPU
    lengths: Sequence[int],  # of documents
    num_steps: int,
) -> RowCounts:
    """Count the rows of one packed sequence."""
    documents = torch.full(loss_mask.shape, -1, dtype=torch.int64)
    places = torch.zeros_like(documents)
    start = 0
    for index, length in enumerate(lengths):
        documents[start : start + length] = index
        places[start : start + length] = torch.arange(1, length + 1)
        start += length
    active = scored_positions(loss_mask, documents, num_steps).any(0)
    needed = active.clone()
    for step in range(1, num_steps):
        needed[step:] |= active[: len(active) - step]
    return RowCounts(
        num_positions=start,
        num_active=int(active.sum()),
        num_needed=int(needed.sum()),
        num_targets=int((loss_mask & (documents >= 0)).sum()),
        num_pairs=int(places[active].sum()),
        num_all_pairs=int(places.sum()),
    )


def count_flops(config: Eagle3Config, rows: RowCounts, *, train_head: bool) -> float:
    """Floating-point operations of forward and backward over one packed sequence."""
    size, inner, steps = config.hidden_size, config.intermediate_size, config.ttt_steps
    query, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    everything, active = rows.num_positions, rows.num_active
    # Products without a gradient of their input count forward and weight gradient only.
    products = 2 * everything * size * config.num_aux_layers * config.target_hidden_size
    products += 2 * size * (rows.num_needed * query + everything * kv)
    for layer in range(config.num_layers):
        is_last = layer == config.num_layers - 1
        first = active if is_last else everything
        rest = (steps - 1) * active
        products += 3 * size * kv * (everything + rest)
        products += 3 * (2 * size * query + 3 * size * inner) * (first + rest)
    head = config.draft_vocab_size * size * rows.num_targets
    products += head + head * steps * (3 if train_head else 2)
    # Scores and values forward, five products backward.
    pairs = steps * rows.num_pairs * config.num_layers
    pairs += (config.num_layers - 1) * (rows.num_all_pairs - rows.num_pairs)
    return 2.0 * (products + 7 * pairs * query)


def count_parameters(config: Eagle3Config) -> int:
    """Weights of the draft itself, its lm_head among them."""
    total = 0
    for shape in config.tensor_shapes().values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
