"""Float8 linear layers against the float64 product of what they round to."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from speculators_cli.core.engines.comparison import MAX_ERROR
from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.float8_linear import (
    Float8Gated,
    Float8Linear,
    is_gated,
    replace_linears,
)
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.kernels.support import why_not_float8
from tests.tiny_families import END_ID, SIZES, VOCAB, build_model

multiplies = pytest.mark.skipif(
    why_not_float8(torch.device("cpu")) is not None, reason="needs a torch that does so on a CPU"
)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows as e4m3 with a scale each, in float64."""
    scales = rows.double().abs().amax(-1, keepdim=True) / 448
    return (rows.double() / scales).to(torch.float8_e4m3fn).double() * scales


@multiplies
def test_the_product_is_that_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).bfloat16()
    inputs = torch.randn(3, 5, 64).bfloat16()
    # Tokens and outputs of very different size, as verifiers have them.
    inputs[0, 0] *= 1000
    linear.weight.data[7] *= 1e-3

    found = Float8Linear(linear)(inputs).detach()

    expected = rounded(inputs) @ rounded(linear.weight.detach()).T + linear.bias.detach().double()
    # The result is rounded to bfloat16, and its bias is added there: 8 bits each; a few values lie
    # between two of float8, and round the other way in float32.
    scale = expected.abs().amax(-1, keepdim=True)
    assert found.shape == (3, 5, 48)
    assert float(((found.double() - expected) / scale).abs().max()) < 2**-6


@multiplies
def test_rows_of_zeros_stay_zero() -> None:
    linear = nn.Linear(32, 16, bias=False).bfloat16()

    found = Float8Linear(linear)(torch.zeros(2, 32).bfloat16())

    assert torch.equal(found, torch.zeros(2, 16).bfloat16())


def test_layers_of_other_widths_keep_their_precision() -> None:
    module = nn.Sequential(nn.Linear(32, 16), nn.Sequential(nn.Linear(16, 20)))

    number = replace_linears(module)

    assert number == 1
    kinds = [type(x).__name__ for x in module.modules() if not isinstance(x, nn.Sequential)]
    assert kinds == ["Float8Linear", "Linear"]


def make_gated(**changes: Any) -> Any:
    config = LlamaConfig(**SIZES | {"hidden_size": 48, "intermediate_size": 64} | changes)
    return LlamaMLP(config).bfloat16()


@multiplies
def test_a_gated_layer_computes_what_its_linear_layers_do(rng: torch.Generator) -> None:
    module, other = nn.ModuleList([make_gated(mlp_bias=True)]), make_gated(mlp_bias=True)
    other.load_state_dict(module[0].state_dict())
    inputs = torch.randn(3, 5, 48, generator=rng).bfloat16()

    numbers = replace_linears(module), replace_linears(other)

    assert numbers == (3, 3)
    assert isinstance(module[0], Float8Gated)
    assert torch.equal(module[0](inputs), other(inputs))


def test_layers_with_another_gate_keep_their_formula() -> None:
    limited = make_gated()
    limited.act_fn = nn.Sequential(nn.Hardtanh(-100.0, 7.0), nn.SiLU())
    others = [make_gated(hidden_act="gelu"), make_gated(intermediate_size=40), limited]

    assert is_gated(make_gated())
    assert not any(map(is_gated, others))


@multiplies
def test_states_differ_by_rounding_and_the_fingerprint_says_so() -> None:
    plain, in_float8 = (
        TransformersEngine(
            build_model("wide-llama").bfloat16(),
            (1, 3),
            end_ids=frozenset({END_ID}),
            name="wide",
            is_float8=is_float8,
        )
        for is_float8 in (False, True)
    )
    ids = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(1))
    packed = Packed(ids, [8, 12], torch.arange(20))

    expected, found = plain.capture(packed).last.float(), in_float8.capture(packed).last.float()

    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()
    # 4 bits of mantissa in each factor; the errors of many terms average out.
    assert 1e-3 < float(error) < 0.2
    assert in_float8.fingerprint["compute_dtype"] == "float8"
    assert "compute_dtype" not in plain.fingerprint


@multiplies
def test_rounding_to_float8_does_not_decide_whether_documents_are_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Between the errors of four layers in bfloat16 and in float8.
    monkeypatch.setitem(MAX_ERROR, torch.bfloat16, 0.02)

    engine = TransformersEngine(
        build_model("wide-llama").bfloat16(),
        (1, 3),
        end_ids=frozenset({END_ID}),
        name="wide",
        is_float8=True,
    )

    assert engine.is_packed
