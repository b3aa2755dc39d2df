"""AdamW with clip and skip, and the learning rate."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from speculators_cli.core.training.optimizer import Optimizer, learning_rate
from speculators_cli.settings.train import OptimizerSettings, ScheduleSettings
from tests.tiny_drafts import KERNELS


def test_linear_rises_over_the_warm_up_and_reaches_zero_at_the_end() -> None:
    settings = ScheduleSettings(warmup_ratio=0.1)

    rates = [learning_rate(s, peak=2.0, total_steps=50, settings=settings) for s in range(51)]

    assert rates[0] > 0
    assert rates[:6] == sorted(rates[:6])
    assert rates[5] == max(rates) == 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[49] > 0
    assert rates[50] == 0


def test_cosine_passes_half_the_peak_in_the_middle() -> None:
    settings = ScheduleSettings(scheduler="cosine", warmup_ratio=0.0)

    rates = [learning_rate(s, peak=1.0, total_steps=10, settings=settings) for s in (0, 5, 10)]

    assert rates == pytest.approx([1.0, 0.5, 0.0])


def test_none_is_constant_without_warm_up() -> None:
    settings = ScheduleSettings(scheduler="none")

    rates = {learning_rate(s, peak=3.0, total_steps=800, settings=settings) for s in range(9)}

    assert rates == {3.0}


def make_module(size: int = 7) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, size, bias=False), nn.LayerNorm(size), nn.Linear(size, 3, bias=False)
    )


# Of the larger ones, a matrix has several blocks, and all permit wide loads.
@pytest.mark.parametrize("size", [7, 1600])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_equals_clip_then_adamw(kernels: str, size: int) -> None:
    module = make_module(size)
    expected = copy.deepcopy(module)
    settings = OptimizerSettings(max_grad_norm=0.5, weight_decay=0.3)
    optimizer = Optimizer(module, settings, use_fast_kernels=kernels == "fast")
    gains = [p for p in expected.parameters() if p.dim() == 1]
    matrices = [p for p in expected.parameters() if p.dim() == 2]
    groups = [
        {"params": matrices, "weight_decay": 0.3},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1)

    for seed in range(4):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 10
        module(x).square().sum().backward()
        norm = optimizer.step(0.1)
        expected(x).square().sum().backward()
        expected_norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(norm, expected_norm)

    assert expected_norm > 0.5
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        # Same formula in another order of float32 operations.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_gradients_in_bfloat16_are_read_as_they_are() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        module = make_module(1600)
        optimizer = Optimizer(module, OptimizerSettings(), use_fast_kernels=True)
        for seed in range(2):
            rng = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                rounded = torch.randn(parameter.shape, generator=rng).bfloat16()
                # Not of all: a launch reads gradients of one dtype.
                own = dtype if len(parameter) == 1600 and parameter.dim() == 2 else torch.float32
                parameter.grad_dtype = own
                parameter.grad = rounded.to(own)
            norm = optimizer.step(0.1)
        found.append((norm, *module.parameters()))

    assert norm.dtype == torch.float32
    for own, wanted in zip(*found, strict=True):
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, kernels: str) -> None:
    module = make_module()
    optimizer = Optimizer(module, OptimizerSettings(), use_fast_kernels=kernels == "fast")
    module(torch.randn(2, 5)).sum().backward()
    optimizer.step(0.1)
    weights = copy.deepcopy(module.state_dict())
    moments = {p: copy.deepcopy(state) for p, state in optimizer.adamw.state.items()}

    for _ in range(2):
        module(torch.full((2, 5), value)).sum().backward()
        optimizer.step(0.1)

    assert all(torch.equal(a, weights[name]) for name, a in module.state_dict().items())
    for parameter, state in optimizer.adamw.state.items():
        assert all(torch.equal(state[key], moments[parameter][key]) for key in state)
    assert int(optimizer.num_skipped) == 2
    assert int(optimizer.num_skipped_in_a_row) == 2


def test_a_finite_step_ends_a_row_of_skipped_ones() -> None:
    module = make_module()
    optimizer = Optimizer(module, OptimizerSettings())
    for x in (torch.full((2, 5), float("nan")), torch.randn(2, 5)):
        module(x).sum().backward()
        optimizer.step(0.1)

    assert int(optimizer.num_skipped) == 1
    assert int(optimizer.num_skipped_in_a_row) == 0


def test_step_1001_keeps_its_number() -> None:
    # Trap: bfloat16 optimizer state turns step 1001 into 1000.
    module = make_module().bfloat16().float()
    weight = next(module.parameters())
    optimizer = Optimizer(module, OptimizerSettings())
    for _ in range(1001):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-4)

    state = optimizer.adamw.state[weight]
    assert state["step"] == 1001
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_norm_gains_leave_one_under_small_steps() -> None:
    # Trap: bfloat16 gains round a step of 1e-4 away and stay exactly 1.0.
    module = nn.Sequential(nn.LayerNorm(4))
    optimizer = Optimizer(module, OptimizerSettings())

    module(torch.randn(3, 4).bfloat16().float()).square().sum().backward()
    optimizer.step(1e-4)

    weight = module[0].weight
    assert isinstance(weight, nn.Parameter)
    assert (weight != 1.0).all()
