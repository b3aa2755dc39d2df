"""The fast kernels on a GPU, against the plain path in float32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.attention import plain_attention
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from speculators_cli.core.data.batch import Batch, drop_non_finite, rows_of
from speculators_cli.core.data.noise import drop_and_add_noise
from speculators_cli.core.kernels.causal_attention import can_use_flash
from speculators_cli.core.kernels.spans import Spans
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.settings.train import OptimizerSettings
from tests.tiny_drafts import attend_from, filled_draft, make_config, make_sample, pack
from tests.tiny_peagle import make_peagle_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen3": {"arch": "qwen3"},
    "two-layers": {"num_layers": 2},
    "three-qwen3-layers-seven-steps": {"num_layers": 3, "arch": "qwen3", "ttt_steps": 7},
    "norm-before-fc": {"norm_before_fc": True},
    "fc-norm": {"fc_norm": True},
    "norm-output": {"norm_output": True},
    "residual-before-norm": {"norm_before_residual": False},
    "window": {"sliding_window": 20},
    "shortest-window": {"sliding_window": 3},
    "window-in-one-layer": {
        "sliding_window": 50,
        "num_layers": 2,
        "full_attention_layers": (1,),
    },
}
MASKS: dict[str, dict[str, Any]] = {
    "masks": {},
    "masks-three-qwen3-layers-five-steps": {"num_layers": 3, "arch": "qwen3", "ttt_steps": 5},
    "masks-residual-before-norm": {"num_layers": 2, "norm_before_residual": False},
    "masks-window": {"num_layers": 2, "sliding_window": 20},
}
# Masks at drawn depths.
DRAWN: dict[str, tuple[dict[str, Any], DepthSampling]] = {
    "drawn": ({"num_layers": 2, "ttt_steps": 5}, DepthSampling(0.7, 0.2)),
    "drawn-few-anchors": ({"ttt_steps": 4}, DepthSampling(0.5, 0.1, num_anchors=12)),
    "drawn-window": ({"num_layers": 3, "sliding_window": 20}, DepthSampling(0.6, 0.2)),
}


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (6, 6, 128), (4, 1, 40)])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("window", [None, 4, 70, 500])
def test_joint_attention_is_as_close_to_float32_as_the_plain_path(
    num_steps: int, heads: int, kv_heads: int, head_dim: int, share: float, window: int | None
) -> None:
    torch.manual_seed(0)
    bounds = (0, 100, 101, 300, 384)
    rows = (torch.rand(384) < share).nonzero().flatten()
    spans = Spans.of_rows(bounds, rows.numpy(), CUDA)
    rows = rows.cuda()
    query = torch.randn(384, heads, head_dim, device=CUDA, dtype=torch.bfloat16)
    parts = [
        torch.randn(384, kv_heads, head_dim, device=CUDA, dtype=torch.bfloat16)
        for _ in range(2 * num_steps)
    ]
    grad = torch.randn_like(query[rows])
    assert can_use_flash(query.device, query.dtype, head_dim)

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        return attend_from(rows, spans, query, *parts, window=window)

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts, window=window)[rows]

    def run(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (query, *parts)]
        out = attend(*leaves)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run(plain, torch.float32)
    rounded = run(plain, torch.bfloat16)
    own = run(fast, torch.bfloat16)

    for index, (a, b, c) in enumerate(zip(own, rounded, exact, strict=True)):
        # bfloat16 keeps 8 bits, so both are off by some 1e-2; fast by no more than the plain path.
        assert relative_error(a, c) <= max(1.1 * relative_error(b, c), 1e-2), index


def moved(draft: Eagle3Training) -> Eagle3Training:
    """The same on the GPU, its verifier too."""
    draft.verifier = draft.verifier.to(CUDA)
    draft.embedding = draft.verifier.embedding
    draft.kept_ids = draft.kept_ids.cuda()
    draft.verifier_rows = draft.verifier_rows.cuda()
    return draft.cuda()


def run(draft: Eagle3Training, batch: Batch, *, is_fast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    draft.use_fast_kernels = is_fast
    draft.zero_grad()
    sums = draft(batch, torch.tensor(draft.loss_weights, device=CUDA))
    sums.loss.backward()
    return sums.stacked(), {
        name: parameter.grad
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("fraction", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("variant", [*VARIANTS, *MASKS, *DRAWN])
def test_fast_equals_plain(variant: str, fraction: float) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    rng = torch.Generator().manual_seed(0)
    sizes = {
        "hidden_size": 192, "target_hidden_size": 192, "intermediate_size": 320, "num_heads": 6,
        "num_kv_heads": 2, "head_dim": 64, "vocab_size": 900, "draft_vocab_size": 450,
    }  # fmt: skip
    changes, sampling = DRAWN.get(variant, (MASKS.get(variant, {}), DepthSampling()))
    config: Eagle3Config = (
        make_config(**(sizes | VARIANTS[variant]))
        if variant in VARIANTS
        else make_peagle_config(**(sizes | changes))
    )
    draft = moved(filled_draft(config, rng, kept_ids=torch.arange(0, 900, 2)))
    if isinstance(draft, PEagleTraining):
        draft.sampling = sampling
    lengths = (60, 2, 131, 90)
    samples = [make_sample(n, config, rng, supervised_fraction=fraction) for n in lengths]
    batch = draft.draw(pack(*samples, total_seq_len=288).to(CUDA), seed=0, epoch=0)
    assert (batch.depths is not None) == (variant in DRAWN)

    exact_sums, exact = run(draft, batch, is_fast=False)
    sums, grads = run(draft, batch, is_fast=True)
    half = replace(
        batch,
        aux_hidden_states=batch.aux_hidden_states.bfloat16(),
        last_hidden_states=batch.last_hidden_states.bfloat16(),
    )
    _, plain_half = run(draft, half, is_fast=False)
    _, fast_half = run(draft, half, is_fast=True)

    torch.testing.assert_close(sums, exact_sums, rtol=1e-5, atol=1e-3)
    errors = {name: relative_error(grads[name], grad) for name, grad in exact.items()}
    assert max(errors.values()) <= 1e-5, errors
    # Rounding alone makes a single weight's error differ; their mean tells.
    rounding = [
        sum(relative_error(half_grads[name], grad) for name, grad in exact.items()) / len(exact)
        for half_grads in (fast_half, plain_half)
    ]
    assert rounding[0] <= 1.1 * rounding[1], rounding


@pytest.mark.parametrize("window", [None, 1, 2, 10])
@pytest.mark.parametrize("rows", [[1, 4], [5], [2, 5, 9]])
def test_documents_of_one_query_or_none_are_attended(rows: list[int], window: int | None) -> None:
    # Trap: a kernel that takes each document to have a query where none has more than one.
    bounds = (0, 2, 3, 5, 6, 10)
    spans = Spans.of_rows(bounds, np.array(rows), CUDA)
    assert spans.longest_query == 1
    inputs = [
        torch.randn(10, heads, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    ]

    out = attend_from(torch.tensor(rows, device=CUDA), spans, *inputs, window=window)

    query, key, value = (x.float() for x in inputs)
    exact = plain_attention(query, bounds, key, value, window=window)[rows]
    assert relative_error(out.detach(), exact.detach()) < 1e-2
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    exact_grads = torch.autograd.grad(exact, inputs, grad_out.float())
    torch.testing.assert_close(grads, exact_grads, rtol=2e-2, atol=2e-2)


def test_a_windows_queries_at_the_end_of_a_long_document_are_attended() -> None:
    # Keys far before the first query belong to no tile of the kernel's backward.
    torch.manual_seed(0)
    bounds, rows = (0, 2000, 2003), np.array([1900, 1999, 2002])
    spans = Spans.of_rows(bounds, rows, CUDA)
    inputs = [
        torch.randn(2003, heads, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    places = torch.tensor(rows, device=CUDA)

    out = attend_from(places, spans, *inputs, window=130)

    query, key, value = (x.float() for x in inputs)
    exact = plain_attention(query, bounds, key, value, window=130)[places]
    assert relative_error(out.detach(), exact.detach()) < 1e-2
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    exact_grads = torch.autograd.grad(exact, inputs, grad_out.float())
    torch.testing.assert_close(grads, exact_grads, rtol=2e-2, atol=2e-2)
    assert not grads[1][:1770].any()
    assert grads[1][1771:2000].any(-1).any(-1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_documents_are_taken_out_as_on_the_cpu(value: float) -> None:
    config = make_config(hidden_size=200, target_hidden_size=200)
    rng = torch.Generator().manual_seed(0)
    samples = [make_sample(n, config, rng, supervised_fraction=0.8) for n in (9, 12, 7, 15)]
    batch = pack(*samples, total_seq_len=48)
    supervised = batch.document_ids[batch.targets]
    batch.aux_hidden_states[10, 599] = value
    batch.last_hidden_states[int((supervised == 3).nonzero()[-1]), 3] = value
    expected, is_broken = drop_non_finite(batch)

    ready, found = drop_and_add_noise(batch.to(CUDA), 0.05, seed=0, epoch=0)

    assert is_broken.tolist() == [False, True, False, True]
    assert torch.equal(found.cpu(), is_broken)
    assert torch.equal(ready.loss_mask.cpu(), expected.loss_mask)
    assert torch.equal(ready.last_hidden_states.cpu(), expected.last_hidden_states)
    noise = ready.aux_hidden_states.cpu() - expected.aux_hidden_states
    is_left_alone = rows_of(is_broken, batch) | (batch.document_ids < 0)
    assert not noise[is_left_alone].any()
    # Sums with numbers near one are rounded.
    assert noise[~is_left_alone].abs().max() == pytest.approx(0.05, rel=1e-2)


@pytest.mark.parametrize("in_float8", [False, True])
@pytest.mark.parametrize("make", [make_config, make_peagle_config])
def test_nothing_is_compiled_after_the_first_steps(
    make: Callable[..., Eagle3Config], in_float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows, documents, gaps and chunks of the loss differ from batch to batch.
    import triton

    monkeypatch.setattr("speculators_cli.core.kernels.logit_chunks.MAX_ROWS", 100)
    rng = torch.Generator().manual_seed(0)
    config = make(
        hidden_size=192, target_hidden_size=192, intermediate_size=320, num_heads=6,
        head_dim=64, vocab_size=896, draft_vocab_size=448, num_layers=2,
    )  # fmt: skip
    draft = moved(filled_draft(config, rng, kept_ids=torch.arange(0, 896, 2)))
    draft.use_fast_kernels, draft.use_float8 = True, in_float8
    if isinstance(draft, PEagleTraining):
        draft.sampling = DepthSampling(0.7, 0.2, num_anchors=100)
    optimizer = Optimizer(draft, OptimizerSettings(), use_fast_kernels=True)
    compiled: list[str] = []

    def step() -> None:
        lengths = torch.randint(
            2, 90, (int(torch.randint(1, 7, (), generator=rng)),), generator=rng
        )
        fraction = float(torch.rand((), generator=rng))
        samples = [
            make_sample(n, config, rng, supervised_fraction=fraction) for n in lengths.tolist()
        ]
        batch = pack(*samples, total_seq_len=512).to(CUDA).cast(torch.bfloat16)
        finite, _ = drop_and_add_noise(batch, 0.05, seed=0, epoch=0)
        ready = draft.draw(finite, seed=0, epoch=0)
        num_scored = draft.count_scored(ready).clamp(min=1)
        draft(ready, torch.tensor(draft.loss_weights, device=CUDA) / num_scored).loss.backward()
        optimizer.step(1e-4)

    for _ in range(10):
        step()
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["repr"]),
    )
    for _ in range(40):
        step()

    assert compiled == []
