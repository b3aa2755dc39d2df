"""Cost model of a DFlash training step.

Matrix products count at 2 per multiply-add, attention over the keys that a query attends to. The
context is projected once per layer at every position; blocks run through all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.cost import CostModel, Gpu, Work, count_verifier_bytes
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.kernels.logit_chunks import block_chunk_size
from speculators_cli.settings.algorithms.dflash import BlockSettings, DFlashSettings

# Fraction of the data sheet's FLOPS that the compute-bound part of a step reaches, and bytes moved
# per trained parameter by optimizer, casts and gradients: fitted to steps of Qwen3-8B's shape on an
# H100, with 512 to 2,048 anchors.
FLOPS_REACHED = 0.605
BYTES_PER_PARAMETER = 40


@dataclass(frozen=True)
class BlockCounts:
    """Counts of a packed sequence, on average over draws of anchors."""

    num_positions: int  # of documents
    num_supervised: int
    num_anchors: int
    num_scored: float  # predictions
    num_targets: float  # distinct positions that predictions are scored against
    context: float  # rows that the anchors attend to, summed


ConfigT = TypeVar("ConfigT", bound=DFlashConfig)
SettingsT = TypeVar("SettingsT", bound=BlockSettings)


class BlockCost(CostModel[ConfigT, SettingsT]):
    """The cost of a step over drawn anchors."""

    def count_own_products(self, config: ConfigT, counts: BlockCounts) -> float:  # noqa: ARG002
        """Multiply-adds, forward and backward, of what an algorithm adds to DFlash."""
        return 0.0

    def count_work(
        self,
        config: ConfigT,
        settings: SettingsT,
        loss_mask: Tensor,
        lengths: Sequence[int],
    ) -> Work:
        """The work of one packed sequence, from its masks."""
        return self.make_work(
            config, count_blocks(config, settings.num_anchors, loss_mask, lengths)
        )

    def expect_work(
        self,
        config: ConfigT,
        settings: SettingsT,
        lengths: NDArray[np.int64],
        num_targets: NDArray[np.int64],
    ) -> Work:
        """The same from headers only, assuming one answer at the end of each document."""
        targets = np.minimum(num_targets, lengths)
        runs = [
            (int(length - count), int(count))
            for length, count in zip(lengths, targets, strict=True)
        ]
        counts = _count_runs(config, settings.num_anchors, runs, int(lengths.sum()))
        return self.make_work(config, counts)

    def make_work(self, config: ConfigT, counts: BlockCounts) -> Work:
        """The work of these counts."""
        return Work(
            num_positions=counts.num_positions,
            num_targets=counts.num_supervised,
            num_active=counts.num_anchors,
            flops=count_flops(config, counts) + 2.0 * self.count_own_products(config, counts),
        )

    def count_trained(self, config: ConfigT, settings: SettingsT) -> int:
        """Weights that the optimizer updates: all of its own."""
        del settings
        return config.count_parameters()

    def estimate_memory(
        self,
        config: ConfigT,
        settings: SettingsT,
        work: Sequence[Work],
        *,
        total_seq_len: int,
        num_accumulated: int = 1,
        num_ranks: int = 1,
        num_shards: int = 1,
        has_whole_head: bool = False,
        in_float8: bool = False,
    ) -> Mapping[str, int]:
        """Bytes on a GPU at the peak of a step, by purpose.

        Activations are largest when the loss is computed, gradients at the end of the backward
        pass, when most activations are gone: the larger sum counts. All sequences of a step and of
        the next one are on the GPU.
        """
        del settings
        num_anchors = max(part.num_active for part in work)
        num_targets = max(part.num_targets for part in work)
        size, inner, depth = config.hidden_size, config.intermediate_size, config.num_layers
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        trained = config.count_parameters()
        head = config.draft_vocab_size * size
        # float32 weights and two moments; working weights: those that ranks gather, those in float8
        # in two layouts, or the LM head, which all chunks of the loss multiply by.
        states = 12 * trained // num_shards
        is_kept = num_shards > 1 or in_float8
        states += 2 * (trained if is_kept else head if config.owns_head else 0)
        verifier = count_verifier_bytes(config, has_whole_head=has_whole_head)
        rows = num_anchors * config.block_size
        # Per layer: sums before its norms, what attention and the gate read, and what o_proj reads.
        row = 2 * (2 * size + 2 * query + 2 * key + 2 * inner)
        activations = depth * (rows * row + 2 * total_seq_len * 3 * key)
        activations += 2 * (rows * 2 + total_seq_len) * size
        if in_float8:  # inputs of `o_proj` and `fc` once more
            activations += depth * rows * query
            activations += total_seq_len * config.num_aux_layers * config.target_hidden_size
        chunk = block_chunk_size(config.num_draft_tokens, config.draft_vocab_size)
        pairs = config.num_draft_tokens * min(num_anchors, chunk) + min(num_targets, chunk)
        gradients = 4 * trained
        if num_ranks * num_accumulated == 1:  # those of `fc` and the layers are in bfloat16
            layer = 2 * query + 2 * key + 3 * inner
            inputs = config.num_aux_layers * config.target_hidden_size
            gradients -= 2 * size * (depth * layer + inputs)
        if num_shards > 1:  # the rank's shard of their sum
            gradients += gradients // num_shards
        at_loss = 2 * pairs * config.draft_vocab_size
        if num_accumulated > 1:
            at_loss += gradients
        elif config.owns_head and not in_float8:
            at_loss += 4 * head
        freed = activations
        if in_float8:
            freed += 2 * trained
            if config.owns_head:  # inputs and outputs of the LM head wait for its gradient
                pairs = num_anchors * config.num_draft_tokens
                at_loss += pairs * (config.draft_vocab_size + size)
        freed = freed * (depth - 1) // depth
        return {
            "weights_and_optimizer": states,
            "verifier": verifier,
            "batches": 2
            * num_accumulated
            * 2
            * (total_seq_len * config.num_aux_layers + num_targets)
            * config.target_hidden_size,
            "activations": activations,
            "logits_or_gradients": max(at_loss, gradients - freed),
        }

    def estimate_seconds(self, flops: float, num_trained: int, gpu: Gpu) -> float:
        """Seconds of an optimizer step with this many operations."""
        moving = num_trained * BYTES_PER_PARAMETER / gpu.bandwidth
        return flops / (FLOPS_REACHED * gpu.flops) + moving


class DFlashCost(BlockCost[DFlashConfig, DFlashSettings]):
    """The cost of a DFlash step."""


def count_blocks(
    config: DFlashConfig, num_anchors: int, loss_mask: Tensor, lengths: Sequence[int]
) -> BlockCounts:
    """Counts from a mask: each run of supervised positions, by its place in its document."""
    mask, start = loss_mask.numpy(), 0
    runs = []
    for length in lengths:
        own = np.flatnonzero(np.diff(np.concatenate(([0], mask[start : start + length], [0]))))
        runs += [(int(first), int(stop - first)) for first, stop in own.reshape(-1, 2)]
        start += length
    return _count_runs(config, num_anchors, runs, start)


def _count_runs(
    config: DFlashConfig,
    num_anchors: int,
    runs: Sequence[tuple[int, int]],  # place in its document, length
    num_positions: int,
) -> BlockCounts:
    steps = config.num_draft_tokens
    supervised = sum(length for _, length in runs)
    anchors = min(num_anchors, supervised)
    share = anchors / max(supervised, 1)
    scored = sum(sum(max(length - s, 0) for s in range(steps)) for _, length in runs)
    context = sum(length * (first + (length + 1) / 2) for first, length in runs)
    # A position is a target unless none of the anchors that reach it is drawn.
    reach = scored / max(supervised, 1)
    targets = supervised * (1 - (1 - share) ** reach)
    return BlockCounts(num_positions, supervised, anchors, scored * share, targets, context * share)


def count_flops(config: DFlashConfig, counts: BlockCounts) -> float:
    """Floating-point operations of forward and backward over one packed sequence."""
    size, inner, depth = config.hidden_size, config.intermediate_size, config.num_layers
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    positions, rows = counts.num_positions, counts.num_anchors * config.block_size
    # The input of `fc` needs no gradient.
    products = 2.0 * positions * config.num_aux_layers * config.target_hidden_size * size
    products += depth * 3 * positions * 2 * kv * size
    products += depth * 3 * rows * (2 * size * query + 2 * kv * size + 3 * size * inner)
    factor = 3 if config.owns_head else 2
    products += config.draft_vocab_size * size * (counts.num_targets + factor * counts.num_scored)
    # Scores and values forward, five products backward.
    keys = config.block_size * (counts.context + counts.num_anchors * config.block_size)
    return 2.0 * (products + 7 * depth * keys * query)
