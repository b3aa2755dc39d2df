"""What a training step costs: operations, memory and time.

Operations are those that a loss and its gradients need, and no others: matrix products at 2 a
multiply-add, attention over the keys that a query sees. Norms, rotations and activations are left
out; they are a few operations a value. Memory and time are models of the fast kernels' step, fitted
to an H100; docs/how-to/measure-speed.md says how far off they were.
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
    for step in range(1, min(num_steps, len(active))):
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


@dataclass(frozen=True)
class Gpu:
    """What the data sheet of a GPU says."""

    flops: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second


GPUS = {  # by a word in the device's name
    "H100": Gpu(989e12, 3.35e12),
    "H200": Gpu(989e12, 4.8e12),
    "B200": Gpu(2250e12, 8.0e12),
    "A100": Gpu(312e12, 2.0e12),
    "L40S": Gpu(362e12, 0.864e12),
}
# Share of the data sheet's operations that the step's part in proportion to them reached, and bytes
# moved for each trained parameter: casts, gradients, norm and optimizer.
FLOPS_REACHED = 0.617
BYTES_A_PARAMETER = 75


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of this name, if its data sheet is known."""
    return next((gpu for word, gpu in GPUS.items() if word in device_name), None)


def estimate_seconds(flops: float, num_parameters: int, gpu: Gpu) -> float:
    """Seconds of an optimizer step over one packed sequence."""
    moving = num_parameters * BYTES_A_PARAMETER / gpu.bandwidth
    return flops / (FLOPS_REACHED * gpu.flops) + moving


def estimate_memory(
    config: Eagle3Config,
    *,
    total_seq_len: int,
    num_active: int,
    num_targets: int,
    train_head: bool,
    num_accumulated: int = 1,
    num_shards: int = 1,
) -> int:
    """Peak bytes on a GPU in a step, in bfloat16.

    The peak comes either in the loss, when a chunk's logits are there, or in the first layer of the
    backward, when its feed-forward weights' gradients are: by then no other gradient is but the
    head's, unless an earlier sequence of the step left its own. Gradients of activations take the
    place of activations. All sequences of a step are on the GPU, and those of the next.
    """
    size, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    head = config.draft_vocab_size * size
    parameters = count_parameters(config)
    trained = count_trained(config, train_head=train_head)
    # float32 weights and two moments; bfloat16 working weights; what the verifier lends.
    states = 4 * parameters + 8 * trained + 2 * parameters
    if num_shards > 1:
        states = (4 * parameters + 8 * trained) // num_shards + 6 * parameters
    verifier = 2 * 2 * config.vocab_size * size
    if config.draft_vocab_size != config.vocab_size:
        verifier += 2 * head
    rows = total_seq_len * config.num_aux_layers + num_targets
    batches = 2 * num_accumulated * 2 * rows * config.target_hidden_size
    # Of a layer: inputs of its products and norms, what attention and the gate keep.
    row = 2 * (3 * size + 2 * query + kv + kv // 2 + 3 * inner)
    steps = config.ttt_steps * num_active * (config.num_layers * row + 2 * 3 * size)
    whole_rows = (config.num_layers - 1) * (total_seq_len - num_active) * row
    fused = 2 * total_seq_len * (3 * size + query + 2 * kv)
    chunk = chunk_size(config.ttt_steps, config.draft_vocab_size)
    pairs = config.ttt_steps * min(num_active, chunk) + min(num_targets, chunk)
    logits = 2 * pairs * config.draft_vocab_size
    backward = 4 * 3 * size * inner
    gradients = 4 * head if train_head else 0
    if num_accumulated > 1:
        gradients = 4 * trained // num_shards
    total = states + verifier + batches + steps + whole_rows + fused + gradients
    return total + max(logits, backward)


# Draft logits at once. Each chunk reads and writes the whole gradient of the lm_head, so a wide
# vocabulary wants long chunks, and memory short ones.
MAX_LOGITS = 2**28
MIN_ROWS, MAX_ROWS = 2048, 4096


def chunk_size(num_steps: int, draft_vocab_size: int) -> int:
    """Rows that the loss takes at once, each with all its TTT steps."""
    return min(max(MAX_LOGITS // (num_steps * draft_vocab_size), MIN_ROWS), MAX_ROWS)


def count_parameters(config: Eagle3Config) -> int:
    """Weights of the draft itself, its lm_head among them."""
    total = 0
    for shape in config.tensor_shapes().values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def count_trained(config: Eagle3Config, *, train_head: bool) -> int:
    """Weights that the optimizer moves."""
    frozen = 0 if train_head else config.draft_vocab_size * config.hidden_size
    return count_parameters(config) - frozen
