"""A DFlash step on a GPU: fast kernels against the plain path in float32, and its bench."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.data.batch import Batch
from tests.tiny_dflash import filled_blocks, make_block_config
from tests.tiny_drafts import make_sample, pack

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


@pytest.mark.parametrize("draft_vocab_size", [19, 37])
def test_fast_equals_plain(draft_vocab_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    config = make_block_config(draft_vocab_size=draft_vocab_size)
    draft = moved(filled_blocks(config, rng))
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
    for name, grad in grads.items():
        norm = exact[name].norm()
        # float32 sums in another order; bfloat16 rounds a dozen products in a row by 4e-3.
        assert float((grad - exact[name]).norm() / norm) < 1e-4, name
        assert float((rounded[name] - exact[name]).norm() / norm) < 1e-1, name


def test_its_step_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "smollm2-135m", "--algorithm", "dflash", "--full-vocab"]

    code = run(["bench", "--json", *shape, "--total-seq-len", "2048", "--steps", "5"])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["kernels"] == "fast"
    assert report["ttt_steps"] == 7
    assert 0 < report["utilisation"] < 1
