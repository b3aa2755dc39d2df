"""Linear layers of a verifier in float8: for verifiers that are served in float8.

Weights have a scale per output, inputs one per token, both e4m3; products are summed in float32.
"""

import torch
from torch import Tensor, nn

from speculators_cli.core.data.float8 import MAX_FLOAT8, quantize_rows
from speculators_cli.core.engines.verifier_layers import VerifierLayers
from speculators_cli.core.errors import MachineError
from speculators_cli.core.kernels.support import why_not_float8

MULTIPLE = 16  # of both widths, for the matrix product
MIN_SCALE = 2.0**-40  # of a token: a row of zeros stays zero


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
        out: Tensor = torch._scaled_mm(  # noqa: SLF001 - public only since torch 2.12
            values, self.weight.t(), scales, self.scales, out_dtype=inputs.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        if self.bias is not None:
            out = out + self.bias
        result: Tensor = out.unflatten(0, inputs.shape[:-1])
        return result


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
        if isinstance(child, nn.Linear) and not any(n % MULTIPLE for n in child.weight.shape):
            setattr(module, name, Float8Linear(child))
            number += 1
        else:
            number += replace_linears(child)
    return number
