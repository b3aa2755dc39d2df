"""AdamW with PyTorch's state and updates (arXiv 1711.05101, algorithm 2), without its class.

`torch.optim.Optimizer` imports PyTorch's compiler when it is used, which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # PyTorch's defaults
STEP = "step"  # a scalar, float32: number of updates
MOMENTS = ("exp_avg", "exp_avg_sq")  # shaped as the parameter


@dataclass(frozen=True)
class Group:
    """Parameters with the same weight decay."""

    parameters: Sequence[nn.Parameter]
    weight_decay: float


@dataclass(frozen=True)
class Gates:
    """Scalars on the device that decide on an update, so that the host does not wait for them."""

    grad_scale: Tensor  # float32: gradients are divided by it
    found_inf: Tensor  # float32: where it is 1, the update is skipped


class AdamW:
    """Moments of parameters, and their updates.

    Args:
        groups: The parameters, float32, sharded or not.
        use_fast_kernels: Whether a Triton kernel computes the update.
    """

    def __init__(self, groups: Sequence[Group], *, use_fast_kernels: bool) -> None:
        self.groups = groups
        self.use_fast_kernels = use_fast_kernels
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}  # empty before the first update

    @torch.no_grad()
    def step(self, lr: float, gates: Gates) -> None:
        """Update the parameters that have gradients, and clear these."""
        found = [
            Group([p for p in group.parameters if p.grad is not None], group.weight_decay)
            for group in self.groups
        ]
        for group in found:
            for parameter in group.parameters:
                if parameter not in self.state:
                    self.state[parameter] = _make_state(parameter)
        if self.use_fast_kernels:
            self._update_in_one_pass(found, lr, gates)
        else:
            for group in found:
                self._update(group, lr, gates)
        for group in found:
            for parameter in group.parameters:
                parameter.grad = None

    def _update(self, group: Group, lr: float, gates: Gates) -> None:
        if not group.parameters:
            return
        states = [self.state[parameter] for parameter in group.parameters]
        steps, means, squares = ([state[kind] for state in states] for kind in (STEP, *MOMENTS))
        torch._foreach_add_(steps, 1.0)
        torch._fused_adamw_(
            list(group.parameters),
            [p.grad for p in group.parameters if p.grad is not None],
            means,
            squares,
            [],
            steps,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=group.weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            grad_scale=gates.grad_scale,
            found_inf=gates.found_inf,
        )
        torch._foreach_sub_(steps, [gates.found_inf] * len(steps))

    def _update_in_one_pass(self, groups: Sequence[Group], lr: float, gates: Gates) -> None:
        # Triton is only available with a GPU.
        from speculators_cli.core.kernels.adamw import update

        groups = [group for group in groups if group.parameters]
        steps = [self.state[p][STEP] for group in groups for p in group.parameters]
        # One addend per tensor: the host would read a single one, and wait for the device.
        torch._foreach_add_(steps, [1.0 - gates.found_inf] * len(steps))
        # In float64, where 1 - 0.999 is exact enough; all parameters have taken equally many steps.
        corrections = torch.stack([1.0 - beta ** steps[0].double() for beta in BETAS]).float()
        for group in groups:
            means, squares = ([self.state[p][kind] for p in group.parameters] for kind in MOMENTS)
            update(
                group.parameters,
                [p.grad for p in group.parameters if p.grad is not None],
                means,
                squares,
                gates.grad_scale,
                gates.found_inf,
                corrections,
                lr=lr,
                betas=BETAS,
                eps=EPS,
                weight_decay=group.weight_decay,
            )


def _make_state(parameter: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {STEP: step} | {kind: torch.zeros_like(parameter) for kind in MOMENTS}
