"""Linear layers of a verifier in float8: for verifiers that are served in float8.

Weights have a scale per output, inputs one per token, both e4m3; products are summed in float32.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators_cli.core.data.float8 import MAX_FLOAT8, quantize_rows
from speculators_cli.core.engines.verifier_layers import VerifierLayers
from speculators_cli.core.errors import MachineError
from speculators_cli.core.kernels.support import why_not_fast, why_not_float8

MULTIPLE = 16  # of both widths, for the matrix product
MIN_SCALE = 2.0**-40  # of a token: a row of zeros stays zero
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of a gated feed-forward layer
NUM_CHECKED = 16  # tokens


class Float8Linear(nn.Module):
    """A linear layer whose matrix product is computed in float8.

    Args:
        linear: Its weights are quantized; the widths are multiples of 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scales = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)  # [out, in], float8
        self.scales = nn.Parameter(scales[None], requires_grad=False)  # [1, out], float32
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `[..., in]` with the weights; [..., out]."""
        rows = inputs.flatten(0, -2)
        scales = rows.abs().amax(-1, keepdim=True).float().div(MAX_FLOAT8).clamp(min=MIN_SCALE)
        values = (rows.float() / scales).to(torch.float8_e4m3fn)
        return self.multiply(values, scales, inputs)

    def multiply(
        self,
        values: Tensor,  # [tokens, in], float8
        scales: Tensor,  # [tokens, 1], float32
        like: Tensor,  # [..., any]: of as many tokens
    ) -> Tensor:
        """Multiply rounded tokens with the weights; [..., out]."""
        out: Tensor = torch._scaled_mm(  # noqa: SLF001 - public only since torch 2.12
            values, self.weight.t(), scales, self.scales, out_dtype=like.dtype, use_fast_accum=True
        )
        if self.bias is not None:
            out = out + self.bias
        result: Tensor = out.unflatten(0, like.shape[:-1])
        return result


class Float8Gated(nn.Module):
    """A gated feed-forward layer in float8: `down_proj(silu(gate_proj(x)) * up_proj(x))`.

    On a GPU, the input of the last product is rounded in the pass that computes it.

    Args:
        layer: One for which `is_gated` is true.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # Defines the operation; Triton is not installed everywhere.
        from speculators_cli.core.kernels import gated_rows  # noqa: F401

        self.gate_proj, self.up_proj, self.down_proj = (
            Float8Linear(getattr(layer, name)) for name in PROJECTIONS
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute `[..., hidden]` for each token; [..., hidden]."""
        gate, up = self.gate_proj(inputs), self.up_proj(inputs)
        if not inputs.is_cuda:
            plain: Tensor = self.down_proj(F.silu(gate) * up)
            return plain
        values, scales = torch.ops.speculators.round_gated(
            gate.flatten(0, -2), up.flatten(0, -2), MAX_FLOAT8, MIN_SCALE
        )
        out: Tensor = self.down_proj.multiply(values, scales, inputs)
        return out


def use_float8(parts: VerifierLayers) -> int:
    """Replace the linear layers of the decoder layers; return their number.

    Embedding, norms, LM head, and experts that are not linear layers keep their precision.

    Raises:
        MachineError: The device cannot multiply in float8.
    """
    device = parts.device
    reason = why_not_float8(device)
    if reason is not None:
        raise MachineError(
            f"`{device}`: {reason}",
            hint="Choose a GPU of compute capability 8.9 or higher, or another precision",
        )
    return sum(replace_linears(layer) for layer in parts.layers)


def replace_linears(module: nn.Module) -> int:
    """Replace the linear layers in a module that can be; return their number."""
    number = 0
    for name, child in list(module.named_children()):
        if _fits(child):
            setattr(module, name, Float8Linear(child))
            number += 1
        elif is_gated(child):
            setattr(module, name, Float8Gated(child))
            number += len(PROJECTIONS)
        else:
            number += replace_linears(child)
    return number


@torch.no_grad()
def is_gated(module: Any) -> bool:
    """Whether a module computes `down_proj(silu(gate_proj(x)) * up_proj(x))`, and a kernel can.

    Families differ in activations, factors and limits: it is tried on random tokens of all sizes.
    """
    parts: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    if not all(map(_fits, parts)) or why_not_fast(parts[0].weight.device) is not None:
        return False
    gate_proj, up_proj, down_proj = parts
    tokens = torch.randn(1, NUM_CHECKED, gate_proj.in_features, generator=torch.Generator())
    tokens *= torch.logspace(-1, 2, NUM_CHECKED)[:, None]
    inputs = tokens.to(gate_proj.weight)
    return torch.equal(module(inputs), down_proj(F.silu(gate_proj(inputs)) * up_proj(inputs)))


def _fits(module: Any) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer of widths that can be multiplied."""
    return isinstance(module, nn.Linear) and not any(n % MULTIPLE for n in module.weight.shape)
