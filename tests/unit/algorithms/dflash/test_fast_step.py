"""The fast step of blocks: what it keeps for the backward, and its products in float8."""

from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.training import DSparkTraining, LossParts
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from tests.gradients import assert_float8_is_near, assert_float8_is_off
from tests.tiny_dflash import DECAY, filled_blocks, make_block_config
from tests.tiny_drafts import WIDE, fill_weights, filled_draft, make_config, make_sample, pack

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def bytes_kept(num_layers: int, batch: Batch, rng: torch.Generator) -> int:
    """Bytes that the backward of a step needs, without weights."""
    draft = filled_blocks(make_block_config(num_layers=num_layers), rng)
    draft.use_fast_kernels = True
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if not isinstance(x, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sums = draft(draft.draw(batch, seed=0, epoch=0))
    assert sums.loss.requires_grad
    return sum(kept.values())


def test_a_layer_keeps_what_is_dear_to_compute_again(rng: torch.Generator) -> None:
    config = make_block_config()
    batch = pack(*(make_sample(n, config, rng) for n in (7, 9)), total_seq_len=18)

    added = bytes_kept(2, batch, rng) - bytes_kept(1, batch, rng)

    rows = int(batch.host_mask.sum()) * config.block_size
    query, key = 48, 16
    # Sums before both norms with their scales, projections, the result of attention with its
    # logarithms, and gate and up; of the context, projections and rotated keys.
    row = 2 * (24 + 1) + (query + 2 * key) + (query + config.num_heads) + 2 * 40
    context = 18 * 3 * key
    assert rows > 20
    assert added == 4 * (rows * row + context)


def wide_draft(rng: torch.Generator) -> DSparkTraining:
    kept = torch.arange(0, 64, 2)
    block = make_block_config(**WIDE, mask_token_id=63, num_layers=1, block_size=3)
    shared = {field.name: getattr(block, field.name) for field in fields(block)}
    draft = DSparkTraining(
        DSparkConfig(**shared, markov_rank=16, markov_head_type="vanilla", has_confidence=True),
        filled_draft(make_config(**WIDE), rng, kept_ids=kept).verifier,
        VocabMap(kept - torch.arange(32), torch.arange(64) % 2 == 0),
        parts=LossParts(ce=0.1, l1=0.9, confidence=0.7),
        weights=DECAY,
        num_anchors=100,
        use_fast_kernels=True,
    )
    fill_weights(draft, rng)
    return draft


def test_a_step_in_float8_has_nearly_the_same_loss_and_gradients(rng: torch.Generator) -> None:
    draft = wide_draft(rng)
    batch = pack(*(make_sample(n, draft.config, rng) for n in (6, 8)), total_seq_len=16)
    batch = draft.draw(batch, seed=0, epoch=0)

    assert_float8_is_near(draft, batch)


def test_validation_is_not_in_float8(rng: torch.Generator) -> None:
    draft = wide_draft(rng).eval()
    batch = draft.draw(pack(make_sample(6, draft.config, rng)), seed=0, epoch=0)

    assert_float8_is_off(draft, batch)
