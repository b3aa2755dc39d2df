"""Products in float8 on a GPU: the kernels against the CPU's rounding, a step against float32."""

import json
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.float8 import (
    Rounded,
    RoundedPairs,
    multiply,
    round_rows,
    round_weight,
    transpose,
)
from tests.gpu.test_fast import moved, relative_error
from tests.tiny_drafts import filled_draft, make_config, make_sample, pack

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SIZES = {
    "hidden_size": 192, "target_hidden_size": 192, "intermediate_size": 320, "num_heads": 6,
    "num_kv_heads": 2, "head_dim": 64, "vocab_size": 896,
}  # fmt: skip


def rows_of_all_sizes(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-12, 6, num_rows)[:, None]
    x = torch.randn(num_rows, width, generator=generator) * sizes
    x[num_rows // 2] = 0
    return x.to(dtype)


def restored(rounded: Rounded) -> Tensor:
    return rounded.values.double() * rounded.scales.double()[:, None]


def assert_equal_bits(own: Rounded, plain: Rounded) -> None:
    assert torch.equal(own.scales.cpu(), plain.scales)
    assert torch.equal(own.values.cpu().view(torch.uint8), plain.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 4096, 4112, 32000])
def test_rows_are_rounded_as_on_the_cpu(width: int, dtype: torch.dtype) -> None:
    x = rows_of_all_sizes(77, width, dtype)

    assert_equal_bits(round_rows(x.cuda()), round_rows(x))
    # Rows of a wider matrix.
    both = torch.cat([x, x], dim=1).cuda()
    assert_equal_bits(round_rows(both[:, width:]), round_rows(x))


@pytest.mark.parametrize("num_rows", [1, 7, 128, 333])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 208), (208, 16), (144, 4096)])
def test_factors_are_transposed_as_on_the_cpu(
    num_rows: int, num_outputs: int, num_inputs: int
) -> None:
    grad, _ = round_rows(rows_of_all_sizes(num_rows, num_outputs, torch.float32))
    x, _ = round_rows(rows_of_all_sizes(num_rows, num_inputs, torch.float32))
    scales = torch.exp2(-(torch.arange(num_rows).float() % 17))
    padded = -(-num_rows // 16) * 16

    plain = [
        torch.empty(size, padded, dtype=torch.float8_e4m3fn) for size in (num_outputs, num_inputs)
    ]
    around = [
        torch.ones(size, padded + 32, device=CUDA).to(torch.float8_e4m3fn)
        for size in (num_outputs, num_inputs)
    ]
    transpose(grad, x, scales, torch.tensor([2.0]), *plain)
    transpose(
        *(part.cuda() for part in (grad, x, scales, torch.tensor([2.0]))),
        *(own[:, 16:-16] for own in around),
    )

    for own, wanted in zip(around, plain, strict=True):
        found = own.cpu().float()
        assert torch.equal(found[:, 16:-16], wanted.float())
        assert (found[:, :16] == 1).all()
        assert (found[:, -16:] == 1).all()


def test_a_weight_is_rounded_as_on_the_cpu() -> None:
    parts = [torch.randn(n, 224) * n for n in (48, 160, 16)]
    # Halves of a wider weight.
    halves = [torch.cat([part, part], dim=1).cuda()[:, 224:] for part in parts]
    gain = torch.rand(224) + 0.5

    for norm_weight in (None, gain):
        on_gpu = None if norm_weight is None else norm_weight.cuda()
        own, plain = round_weight(halves, on_gpu), round_weight(parts, norm_weight)
        assert_equal_bits(own.by_output, plain.by_output)
        assert_equal_bits(own.by_input, plain.by_input)


def test_products_are_those_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(333, 4096, device=CUDA), torch.randn(512, 4096, device=CUDA)
    rounded, others = round_rows(x), round_weight([weight], None).by_output

    product = multiply(rounded, others, torch.bfloat16)

    # bfloat16 keeps 8 bits; sums inside the product lose a few more.
    assert relative_error(product, restored(rounded) @ restored(others).T) < 4e-3


def test_a_weights_gradient_is_the_sum_over_all_uses() -> None:
    torch.manual_seed(0)
    pairs, exact = RoundedPairs(), torch.zeros(512, 256, dtype=torch.float64, device=CUDA)
    for num_rows in (333, 0, 1000):
        size = torch.exp2(torch.randn(num_rows, 1, device=CUDA))
        grad = round_rows(torch.randn(num_rows, 512, device=CUDA) * size)
        x = round_rows(torch.randn(num_rows, 256, device=CUDA))
        exact += restored(grad).T @ restored(x)
        pairs.add(grad, x)

    total = pairs.take_product(torch.float32)

    assert total.dtype == torch.float32
    assert relative_error(total, exact) < 4e-3


def half(batch: Batch) -> Batch:
    return batch.to(CUDA).cast(torch.bfloat16)


def gradients(draft: DraftModel, batch: Batch, *, in_float8: bool) -> dict[str, Tensor]:
    draft.use_fast_kernels, draft.use_float8 = True, in_float8
    draft.zero_grad()
    draft(batch, torch.tensor(draft.loss_weights, device=CUDA)).loss.backward()
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_gradients_of_a_step_are_near_those_in_float32(num_layers: int, fraction: float) -> None:
    rng = torch.Generator().manual_seed(0)
    config = make_config(**SIZES, draft_vocab_size=448, num_layers=num_layers)
    draft = moved(filled_draft(config, rng, kept_ids=torch.arange(0, 896, 2)))
    samples = [make_sample(n, config, rng, supervised_fraction=fraction) for n in (60, 2, 131)]
    batch = pack(*samples, total_seq_len=208).to(CUDA)

    exact = gradients(draft, batch, in_float8=False)
    found = gradients(draft, half(batch), in_float8=True)

    assert found.keys() == exact.keys()
    errors = {name: relative_error(found[name], grad) for name, grad in exact.items()}
    # A product's error is 4 %, and a gradient has passed through a dozen of them.
    assert min(errors.values()) > 1e-2, errors
    assert max(errors.values()) < 0.35, errors


def test_a_width_that_torch_does_not_multiply_is_left_in_the_compute_dtype() -> None:
    rng = torch.Generator().manual_seed(0)
    config = make_config(**SIZES, draft_vocab_size=441)
    draft = moved(filled_draft(config, rng, kept_ids=torch.arange(441)))
    batch = half(pack(make_sample(60, config, rng), total_seq_len=64))

    found = gradients(draft, batch, in_float8=True)

    assert all(grad.isfinite().all() and grad.any() for grad in found.values())


@pytest.mark.parametrize("algorithm", ["eagle3", "peagle", "dspark"])
def test_its_step_is_timed(
    algorithm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = Mock(wraps=round_rows)
    monkeypatch.setattr("speculators_cli.core.kernels.factors.round_rows", rounded)
    shape = ["--shape", "smollm2-135m", "--total-seq-len", "2048", "--steps", "5"]

    code = run(["bench", "--json", *shape, "--algorithm", algorithm, "--gemm-dtype", "float8"])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["kernels"], report["gemm_dtype"]) == ("fast", "float8")
    assert 0 < report["loss"] < 20
    assert rounded.called
