"""What the capture of hidden states takes: operations, time and memory of a dense verifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speculators_cli.core.models.verifier_shape import VerifierShape

# Of a GPU's dense bfloat16 peak, reached by compiled layers over packed sequences.
FLOPS_REACHED = 0.62
FLOAT8_SPEEDUP = 1.65  # of layers whose matrix products are in float8, with all that they round
BYTES = 2  # of a value in bfloat16


@dataclass(frozen=True)
class CaptureCost:
    """The cost of the capture with one verifier."""

    verifier: VerifierShape
    in_float8: bool = False  # whether its layers multiply in float8

    @property
    def num_layer_parameters(self) -> int:
        """Weights of the decoder layers; those of norms are left out."""
        v = self.verifier
        attention = 2 * v.hidden_size * v.head_dim * (v.num_heads + v.num_kv_heads)
        return v.num_layers * (attention + 3 * v.hidden_size * v.intermediate_size)

    @property
    def num_layer_bytes(self) -> int:
        """Size of these weights on a GPU."""
        return (1 if self.in_float8 else BYTES) * self.num_layer_parameters

    @property
    def speedup(self) -> float:
        """Of the layers, over bfloat16."""
        return FLOAT8_SPEEDUP if self.in_float8 else 1.0

    def count_flops(self, lengths: Sequence[int]) -> float:
        """Floating-point operations for documents of these lengths, without the LM head."""
        v = self.verifier
        # Scores and values of half of all pairs.
        pairs = 2 * v.num_layers * v.num_heads * v.head_dim * sum(n * n for n in lengths)
        return 2.0 * self.num_layer_parameters * sum(lengths) + pairs

    def estimate_seconds(self, flops: float, peak_flops: float) -> float:
        """Seconds on a GPU with this many operations per second in bfloat16."""
        return flops / (FLOPS_REACHED * self.speedup * peak_flops)

    def add_memory(
        self, step: Mapping[str, int], *, total_seq_len: int, num_shards: int = 1
    ) -> dict[str, int]:
        """Bytes on a GPU at the peak of a step with capture, by purpose.

        Embedding and LM head are those that the draft reads. Batches are prefetched without hidden
        states. The buffers of the capture are free before the step needs its own.

        Args:
            step: Of a step with stored hidden states.
            total_seq_len: Positions in one packed sequence.
            num_shards: GPUs that the verifier's layers are sharded across.
        """
        v = self.verifier
        weights = self.num_layer_bytes
        if num_shards > 1:
            # The layer that computes, the one that is gathered meanwhile, and an odd last one.
            weights = weights // num_shards + (2 + v.num_layers % 2) * weights // v.num_layers
        own = {"weights_and_optimizer", "verifier", "batches"}
        needed_in_step = sum(size for name, size in step.items() if name not in own)
        buffers = BYTES * total_seq_len * (3 * v.intermediate_size + 6 * v.hidden_size)
        return {
            **step,
            "batches": step["batches"] // 2,
            "capture_weights": weights,
            "capture_buffers": max(buffers - needed_in_step, 0),
        }

    def count_stored_bytes(
        self, num_tokens: int, num_targets: int, num_aux_layers: int, *, is_float8: bool = False
    ) -> int:
        """Size of the hidden states of samples, stored at supervised tokens.

        In bfloat16, or in float8 with a scale of 4 bytes per token and layer.
        """
        rows = num_tokens * num_aux_layers + num_targets
        size = self.verifier.hidden_size
        return rows * (size + 4 if is_float8 else BYTES * size)
