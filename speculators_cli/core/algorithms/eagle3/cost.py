"""Cost model of an EAGLE-3 training step.

Only operations that the loss and its gradients need are counted: matrix products at 2 per
multiply-add, attention over the keys that a query attends to. Norms, rotations and activations are
excluded; they are a few operations per value. Memory and time are models of the fast kernels' step,
fitted to an H100; docs/how-to/measure-speed.md has their errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.cost import CostModel, Gpu, Work, count_verifier_bytes
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.objective import scored_positions
from speculators_cli.core.kernels.logit_chunks import chunk_size
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings, EagleSettings

EagleConfigT = TypeVar("EagleConfigT", bound=Eagle3Config)
EagleSettingsT = TypeVar("EagleSettingsT", bound=EagleSettings)

# Fraction of the data sheet's FLOPS that the compute-bound part of a step reaches, and bytes moved
# per trained parameter: casts, gradients, gradient norm and optimizer.
FLOPS_REACHED = 0.617
BYTES_PER_PARAMETER = 75


@dataclass(frozen=True)
class RowCounts:
    """Number of rows of a packed sequence for each part of a step."""

    num_positions: int  # of documents
    num_active: int  # are scored in some TTT step
    num_needed: int  # are read as some active position's token
    num_targets: int  # supervised
    pairs: tuple[int, ...]  # in each layer, of an active row and a key that it attends to
    all_pairs: tuple[int, ...]  # in each layer, of any position and a key that it attends to


class EagleCost(CostModel[EagleConfigT, EagleSettingsT]):
    """The cost of a step that computes active rows only."""

    def count_passes(self, config: EagleConfigT, settings: EagleSettingsT, num_active: int) -> int:
        """Passes of active rows through TTT steps: all rows go through all steps."""
        del settings
        return config.ttt_steps * num_active

    def count_last(self, num_active: int, passes: int) -> int:
        """Of these passes, those through the steps that are computed last: all through one step."""
        del passes
        return num_active

    def count_spared_flops(self, config: EagleConfigT, num_later: int) -> float:
        """Operations of EAGLE-3 that this algorithm does not need.

        Args:
            config: Of the draft.
            num_later: Passes of rows through the steps after the first.
        """
        del config, num_later
        return 0.0

    def count_other_flops(self, config: EagleConfigT, rows: RowCounts, passes: int) -> float:
        """Operations that take as long as what the kernels compute beside those that are needed."""
        del config, rows, passes
        return 0.0

    def count_spared_bytes(self, config: EagleConfigT, num_later: int) -> int:
        """Bytes of activations of EAGLE-3 that this algorithm does not keep; as above."""
        del config, num_later
        return 0

    def count_work(
        self,
        config: EagleConfigT,
        settings: EagleSettingsT,
        loss_mask: Tensor,
        lengths: Sequence[int],
    ) -> Work:
        """The work of one packed sequence, from its masks."""
        return self._make_work(config, settings, count_rows(config, loss_mask, lengths))

    def expect_work(
        self,
        config: EagleConfigT,
        settings: EagleSettingsT,
        lengths: NDArray[np.int64],
        num_targets: NDArray[np.int64],
    ) -> Work:
        """The same from headers only, assuming evenly distributed supervised positions."""
        sizes, targets = lengths, np.minimum(num_targets, lengths)
        # One turn per document: a few positions before its first supervised one are active too.
        active = np.minimum(targets + config.ttt_steps - 1, sizes) * (targets > 0)
        share = active / np.maximum(sizes, 1)
        all_pairs = [_pairs_of(sizes, window) for window in config.windows]
        rows = RowCounts(
            num_positions=int(sizes.sum()),
            num_active=int(active.sum()),
            num_needed=int(active.sum()),
            num_targets=int(targets.sum()),
            pairs=tuple(int((pairs * share).sum()) for pairs in all_pairs),
            all_pairs=tuple(int(pairs.sum()) for pairs in all_pairs),
        )
        return self._make_work(config, settings, rows)

    def count_trained(self, config: EagleConfigT, settings: EagleSettingsT) -> int:
        """Weights that the optimizer updates."""
        frozen = 0 if settings.train_head else config.draft_vocab_size * config.hidden_size
        return config.count_parameters() - frozen

    def estimate_memory(
        self,
        config: EagleConfigT,
        settings: EagleSettingsT,
        work: Sequence[Work],
        *,
        total_seq_len: int,
        num_accumulated: int = 1,
        num_ranks: int = 1,
        num_shards: int = 1,
        has_whole_head: bool = False,
        in_float8: bool = False,
    ) -> Mapping[str, int]:
        """Bytes on a GPU at the peak of a step, by purpose; in float8 they are about the same.

        The peak is either in the loss, with the logits of a chunk, or after the backward of the
        steps that were computed last: only their activations are gone, and all layers have
        gradients. In the loss only the LM head has, unless an earlier sequence of the step was
        accumulated. Gradients of activations replace activations. All sequences of a step and of
        the next one are on the GPU.
        """
        del num_ranks, in_float8
        num_active = max(part.num_active for part in work)
        num_targets = max(part.num_targets for part in work)
        passes = self.count_passes(config, settings, num_active)
        size, inner = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        head = config.draft_vocab_size * size
        parameters, trained = config.count_parameters(), self.count_trained(config, settings)
        # float32 weights and two moments; bfloat16 working weights.
        states = 4 * parameters + 8 * trained + 2 * parameters
        if num_shards > 1:
            # Whole working weights, and copies of those that are stacked; the first layer's inputs
            # are twice as wide, and its q, k and v are gathered in float32.
            stacked = config.num_layers * (2 * size * inner + size * kv)
            first = 2 * size * (query + kv)
            working = 2 * (parameters + stacked + 2 * first)
            states = (4 * parameters + 8 * trained) // num_shards + working
        verifier = count_verifier_bytes(config, has_whole_head=has_whole_head)
        rows = total_seq_len * config.num_aux_layers + num_targets
        # Per layer: inputs of its products and norms, tensors saved by attention and the gate.
        row = 2 * (3 * size + 2 * query + kv + kv // 2 + 2 * inner)
        # A chunk's targets are as many as its rows.
        chunk = config.ttt_steps * chunk_size(config.ttt_steps, config.draft_vocab_size)
        pairs = min(passes, chunk) + min(num_targets, chunk * num_active // max(passes, 1))
        gradients = 4 * head if settings.train_head else 0
        layers = 2 * query + kv + 3 * inner
        layers = 4 * size * (config.num_layers * layers + query + kv)
        if num_accumulated > 1:
            gradients, layers = 4 * trained, 0
        if num_shards > 1:  # the rank's shard of their sum
            gradients += gradients // num_shards
        return {
            "weights_and_optimizer": states,
            "verifier": verifier,
            "batches": 2 * num_accumulated * 2 * rows * config.target_hidden_size,
            "activations": passes * (config.num_layers * row + 2 * 3 * size)
            + (config.num_layers - 1) * (total_seq_len - num_active) * row
            + 2 * total_seq_len * (3 * size + query + 2 * kv)
            - self.count_spared_bytes(config, passes - num_active),
            "gradients": gradients,
            "logits_or_layer_gradients": max(
                2 * pairs * config.draft_vocab_size,
                layers - self.count_last(num_active, passes) * config.num_layers * row,
            ),
        }

    def estimate_seconds(self, flops: float, num_trained: int, gpu: Gpu) -> float:
        """Seconds of an optimizer step with this many operations."""
        moving = num_trained * BYTES_PER_PARAMETER / gpu.bandwidth
        return flops / (FLOPS_REACHED * gpu.flops) + moving

    def _make_work(self, config: EagleConfigT, settings: EagleSettingsT, rows: RowCounts) -> Work:
        passes = self.count_passes(config, settings, rows.num_active)
        flops = count_flops(config, rows, num_passes=passes, train_head=settings.train_head)
        flops -= self.count_spared_flops(config, passes - rows.num_active)
        other = self.count_other_flops(config, rows, passes)
        return Work(rows.num_positions, rows.num_targets, rows.num_active, flops, other)


class Eagle3Cost(EagleCost[Eagle3Config, Eagle3Settings]):
    """The cost of an EAGLE-3 step."""


def _pairs_of(sizes: NDArray[np.int64], window: int | None) -> NDArray[np.float64]:
    """Pairs of a position and a key that it attends to, of documents of these sizes."""
    seen = sizes if window is None else np.minimum(sizes, window)
    pairs: NDArray[np.float64] = seen * (seen + 1) / 2 + (sizes - seen) * seen
    return pairs


def count_rows(
    config: Eagle3Config,
    loss_mask: Tensor,  # [seq_len], bool, on the CPU
    lengths: Sequence[int],  # of documents
) -> RowCounts:
    """Count the rows of one packed sequence.

    Keys are those of step 0: with a window, a later step sees one more key of its own for each one
    less of them.
    """
    num_steps = config.ttt_steps
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
    seen = [places if window is None else places.clamp(max=window) for window in config.windows]
    return RowCounts(
        num_positions=start,
        num_active=int(active.sum()),
        num_needed=int(needed.sum()),
        num_targets=int((loss_mask & (documents >= 0)).sum()),
        pairs=tuple(int(keys[active].sum()) for keys in seen),
        all_pairs=tuple(int(keys.sum()) for keys in seen),
    )


def count_flops(
    config: Eagle3Config, rows: RowCounts, *, num_passes: int, train_head: bool
) -> float:
    """Floating-point operations of forward and backward over one packed sequence.

    `num_passes` are those of active rows through steps.
    """
    size, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    everything, active = rows.num_positions, rows.num_active
    steps = num_passes / max(active, 1)  # of an active row, on average
    # Products without a gradient of their input count forward and weight gradient only.
    products = 2.0 * everything * size * config.num_aux_layers * config.target_hidden_size
    products += 2 * size * (rows.num_needed * query + everything * kv)
    for layer in range(config.num_layers):
        is_last = layer == config.num_layers - 1
        first = active if is_last else everything
        rest = num_passes - active
        products += 3 * size * kv * (everything + rest)
        products += 3 * (2 * size * query + 3 * size * inner) * (first + rest)
    head = config.draft_vocab_size * size * rows.num_targets
    products += head + head * steps * (3 if train_head else 2)
    return 2.0 * products + count_attention(config, rows, steps)


def count_attention(config: Eagle3Config, rows: RowCounts, steps: float) -> float:
    """Operations of attention, forward and backward; `steps` of an active row, on average."""
    pairs = steps * sum(rows.pairs)
    # In step 0, all layers but the last attend from every position.
    pairs += sum(rows.all_pairs[:-1]) - sum(rows.pairs[:-1])
    # Scores and values forward, five products backward.
    return 2.0 * 7 * pairs * config.num_heads * config.head_dim
