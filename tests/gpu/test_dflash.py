"""A DFlash step on a GPU: fast kernels against the plain path in float32, and its bench."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.dflash.attention import (
    BlockMemory,
    BlockShape,
    BlockSpans,
    find_groups,
)
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.anchor_spans import AnchorSpans
from speculators_cli.core.kernels.block_attention import block_attention
from speculators_cli.core.kernels.block_context import share_context
from speculators_cli.core.models.layers import rotate
from tests.tiny_dflash import filled_blocks, make_block_config
from tests.tiny_drafts import make_sample, pack
from tests.unit.algorithms.dspark.test_dspark import filled_spark, make_spark_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def moved(draft: DFlashTraining) -> DFlashTraining:
    """The same on the GPU, its verifier too."""
    draft.verifier = draft.verifier.to(CUDA)
    draft.embedding = draft.verifier.embedding
    draft.verifier_head = draft.verifier.head
    draft.kept_ids = draft.kept_ids.cuda()
    draft.verifier_rows = draft.verifier_rows.cuda()
    return draft.cuda()


def step(draft: DFlashTraining, batch: Batch, *, is_fast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    draft.use_fast_kernels = is_fast
    draft.zero_grad()
    sums = draft(batch, torch.tensor(draft.loss_weights, device=CUDA))
    sums.loss.backward()
    grads = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    return sums.stacked(), grads


DRAFTS: dict[str, Callable[[torch.Generator], DFlashTraining]] = {
    "reduced vocabulary": lambda rng: filled_blocks(make_block_config(), rng),
    "full vocabulary": lambda rng: filled_blocks(make_block_config(draft_vocab_size=37), rng),
    "window": lambda rng: filled_blocks(make_block_config(draft_window=20), rng),
    "causal": lambda rng: filled_blocks(make_block_config(causal_block=True), rng, loss="tv"),
    "D-PACE": lambda rng: filled_blocks(
        make_block_config(), rng, loss="ce", weights=LossWeights(gamma=None, alpha=0.5)
    ),
    "DSpark": lambda rng: filled_spark(make_spark_config(), rng),
    "recurrent DSpark": lambda rng: filled_spark(make_spark_config(markov_head_type="rnn"), rng),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_fast_equals_plain(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    draft = moved(DRAFTS[kind](rng))
    config = draft.config
    samples = [make_sample(n, config, rng) for n in (60, 2, 131, 90)]
    batch = draft.draw(pack(*samples, total_seq_len=288).to(CUDA), seed=0, epoch=0)

    exact_sums, exact = step(draft, batch, is_fast=False)
    sums, grads = step(draft, batch, is_fast=True)
    half = replace(
        batch,
        aux_hidden_states=batch.aux_hidden_states.bfloat16(),
        last_hidden_states=batch.last_hidden_states.bfloat16(),
    )
    _, rounded = step(draft, half, is_fast=True)

    torch.testing.assert_close(sums[:2], exact_sums[:2], rtol=1e-4, atol=1e-4)
    assert grads.keys() == exact.keys() == rounded.keys()
    limit = 5e-1 if kind == "D-PACE" else 1e-1
    for name, grad in grads.items():
        norm = exact[name].norm()
        # float32 sums in another order; bfloat16 rounds a dozen products in a row by 4e-3, after
        # which the verifier has another token at one position in a hundred.
        assert float((grad - exact[name]).norm() / norm) < 1e-4, name
        assert float((rounded[name] - exact[name]).norm() / norm) < limit, name


def test_attention_in_bfloat16_equals_that_in_float32() -> None:
    rng = torch.Generator().manual_seed(0)
    size, heads, kv_heads, head_dim = 8, 32, 8, 128
    bounds, anchors = (0, 300, 700), np.array([5, 6, 90, 299, 300, 350, 351, 352, 600, 699])
    places = np.searchsorted(anchors, bounds)
    plain_spans = BlockSpans(tuple(places.tolist()), bounds, tuple(anchors.tolist()))
    shape = BlockShape(size)
    groups = find_groups(shape, plain_spans, torch.from_numpy(anchors).cuda())
    first = np.repeat(bounds[:-1], np.diff(places))
    spans = AnchorSpans.of_anchors(
        first, anchors, bounds[-1], CUDA, size=size, window=None, is_causal=False
    )
    num_tokens, width = len(anchors) * size, (heads + 2 * kv_heads) * head_dim
    shapes = [(num_tokens, width), (bounds[-1], 2 * kv_heads * head_dim)]
    inputs = [torch.randn(*shape, generator=rng).cuda() for shape in shapes]
    gains = 1 + 0.1 * torch.randn(3, head_dim, generator=rng).cuda()
    grad = torch.randn(num_tokens, heads, head_dim, generator=rng).cuda()
    angles = torch.arange(710)[:, None, None] * torch.logspace(-4, 0, head_dim // 2).repeat(2)
    rope = (angles.cos().cuda(), angles.sin().cuda())
    positions = torch.from_numpy((anchors[:, None] + np.arange(size)).ravel()).cuda()
    rows = torch.arange(bounds[-1], device=CUDA)

    def turned(x: Tensor, gain: Tensor, at: Tensor) -> Tensor:
        return rotate(F.rms_norm(x, gain.shape, gain, 1e-6), (rope[0][at], rope[1][at]))

    def gradients(dtype: torch.dtype, *, is_fast: bool) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
        weights = gains.clone().requires_grad_()
        projected, context = leaves
        if is_fast:
            (layer,) = share_context(context, weights[2:], 1e-6, rope, rows)
            out = block_attention(projected, layer, weights[:2], 1e-6, rope, positions, spans)
        else:
            parts = projected.view(num_tokens, -1, head_dim).split((heads, kv_heads, kv_heads), 1)
            own_query, own_key = (
                turned(part, gain, positions)
                for part, gain in zip(parts[:2], weights[:2], strict=True)
            )
            key, value = context.view(len(context), 2, kv_heads, head_dim).unbind(1)
            memory = BlockMemory(groups, turned(key, weights[2], rows), value)
            out = memory.attend(own_query, own_key, parts[2])
        out.backward(grad.to(dtype))
        return [out.detach(), *(x.grad for x in (*leaves, weights) if x.grad is not None)]

    exact = gradients(torch.float32, is_fast=False)
    found = gradients(torch.bfloat16, is_fast=True)
    assert len(found) == len(exact) == 4
    for own, expected in zip(found, exact, strict=True):
        # Products of values rounded by 4e-3 each, most of which cancel out.
        assert float((own.float() - expected).norm() / expected.norm()) < 1e-2


def test_its_step_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "smollm2-135m", "--algorithm", "dflash", "--full-vocab"]

    code = run(["bench", "--json", *shape, "--total-seq-len", "2048", "--steps", "5"])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["kernels"] == "fast"
    assert report["ttt_steps"] == 7
    assert 0 < report["utilisation"] < 1
