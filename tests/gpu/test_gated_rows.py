"""Gated activations that are rounded to float8 in one pass, against the eager layers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from speculators_cli.core.data.float8 import MAX_FLOAT8
from speculators_cli.core.engines.float8_linear import MIN_SCALE, Float8Gated, replace_linears
from speculators_cli.core.kernels.gated_rows import round_gated

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("size", [16, 1040, 14336, 28672])
def test_rows_are_rounded_as_by_eager_layers(size: int) -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-8, 2, 77, device=CUDA)[:, None]
    sizes[7] = 0
    gate, up = ((torch.randn(77, size, device=CUDA) * sizes).bfloat16() for _ in range(2))

    values, scales = round_gated(gate, up, MAX_FLOAT8, MIN_SCALE)

    product = (F.silu(gate) * up).float()
    expected_scales = (product.abs().amax(-1, keepdim=True) / MAX_FLOAT8).clamp(min=MIN_SCALE)
    expected = (product / expected_scales).to(torch.float8_e4m3fn)
    # An exponential that differs in its last bit may round the other way in bfloat16: 8 bits.
    torch.testing.assert_close(scales, expected_scales, rtol=2**-7, atol=0)
    is_equal = values.view(torch.uint8) == expected.view(torch.uint8)
    assert is_equal.float().mean() > 0.99


def test_a_compiled_layer_computes_what_its_linear_layers_do() -> None:
    torch.manual_seed(0)
    layer = LlamaMLP(LlamaConfig(hidden_size=512, intermediate_size=1040))
    module = torch.nn.ModuleList([layer]).to(CUDA, torch.bfloat16)
    plain = torch.nn.ModuleDict(dict(layer.named_children()))
    inputs = torch.randn(1, 300, 512, device=CUDA, dtype=torch.bfloat16)

    replace_linears(module)
    replace_linears(plain)

    assert isinstance(module[0], Float8Gated)
    expected = plain["down_proj"](F.silu(plain["gate_proj"](inputs)) * plain["up_proj"](inputs))
    for forward in (module[0], torch.compile(module[0], dynamic=False)):
        error = (forward(inputs) - expected).norm() / expected.norm()
        assert float(error) < 2**-8
