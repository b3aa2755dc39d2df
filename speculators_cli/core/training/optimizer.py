"""AdamW and the learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from speculators_cli.core.kernels.shards import is_shard
from speculators_cli.core.training.adamw import AdamW, Gates, Group
from speculators_cli.core.training.snapshot import Weights
from speculators_cli.settings.train import OptimizerSettings, ScheduleSettings


def learning_rate(step: int, *, peak: float, total_steps: int, settings: ScheduleSettings) -> float:
    """Learning rate of the optimizer step that follows `step` finished ones.

    It increases during warmup, is `peak` right after it, and would be zero at `total_steps`.
    """
    if settings.scheduler == "none":
        return peak
    warmup_steps = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if settings.scheduler == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * max(1.0 - progress, 0.0)


class Optimizer:
    """AdamW with gradient clipping, which skips steps without a finite gradient.

    Clipping and the check happen in the fused kernel, through the two tensors that PyTorch's
    `GradScaler` uses, so no step waits for the GPU. Norm weights are excluded from weight decay.

    Args:
        weights: Those that require a gradient are optimized; float32, sharded or not.
        settings: Of the optimizer; betas are PyTorch's defaults.
        use_fast_kernels: Whether a Triton kernel computes the update.
    """

    def __init__(
        self, weights: Weights, settings: OptimizerSettings, *, use_fast_kernels: bool = False
    ) -> None:
        self.max_grad_norm = settings.max_grad_norm
        self.parameters = [p for _, p in weights.named_parameters() if p.requires_grad]
        norm_weights = [p for p in self.parameters if p.dim() == 1]
        matrices = [p for p in self.parameters if p.dim() > 1]
        self.adamw = AdamW(
            [Group(matrices, settings.weight_decay), Group(norm_weights, 0.0)],
            use_fast_kernels=use_fast_kernels,
        )
        device = self.parameters[0].device
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # in total
        self.num_skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.most_skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, lr: float) -> Tensor:
        """Apply the gradients and clear them.

        Returns:
            The gradient norm before clipping, over all ranks: float32 scalar on the device.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert gradients, "a backward has reached the parameters"
        norm = total_norm(gradients)
        is_broken = ~norm.isfinite()
        scale = (norm / self.max_grad_norm).clamp(min=1.0)
        self.adamw.step(lr, Gates(torch.where(is_broken, 1.0, scale), is_broken.float()))
        self.num_skipped += is_broken
        self.num_skipped_in_a_row = (self.num_skipped_in_a_row + 1) * is_broken
        self.most_skipped_in_a_row = torch.maximum(
            self.most_skipped_in_a_row, self.num_skipped_in_a_row
        )
        return norm


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, sharded or not: float32 scalar. All ranks must call."""
    whole = [x for x in gradients if not is_shard(x)]
    shards = [x for x in gradients if is_shard(x)]
    if not shards:
        return _norm(whole)
    local = _norm([x.to_local() for x in shards])
    square = local.square()
    dist.all_reduce(square, group=shards[0].device_mesh.get_group("shard"))
    if whole:
        square += _norm(whole).square()
    return square.sqrt()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all values: float32 scalar, whatever their dtypes."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        own = [x for x in tensors if x.dtype == dtype]
        norms += torch._foreach_norm(own, 2.0, dtype=torch.float32)  # noqa: SLF001
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
