"""DFlash and DSpark steps against what upstream `speculators` 0.9.0 computed, for given anchors.

`tests/oracle/record_upstream_blocks.py` made the record, with random weights in every parameter.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from speculators_cli.core.algorithms.dflash.blocks import find_blocks
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.training import DSparkTraining, LossParts
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.losses import LOSSES
from tests.tiny_dflash import make_block_config
from tests.tiny_drafts import KERNELS, make_config, make_draft, pack

RECORD = Path(__file__).parents[3] / "oracle" / "upstream-0.9.0-blocks.safetensors"
# Float32 sums of up to 96 products in another order, through two layers.
RTOL = 2e-5


@cache
def read_record() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(RECORD, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    return tensors, {key: json.loads(about[key]) for key in about if key != "torch"}


VARIANTS: dict[str, dict[str, Any]] = read_record()[1]["variants"]


def parts_of(variant: str, part: str) -> dict[str, Tensor]:
    prefix = f"{variant}/{part}/"
    return {
        name.removeprefix(prefix): x
        for name, x in read_record()[0].items()
        if name.startswith(prefix)
    }


def build_draft(variant: str) -> DFlashTraining:
    flags, about = VARIANTS[variant], read_record()[1]
    weights, kept = parts_of(variant, "weights"), parts_of(variant, "inputs")["kept_ids"]
    is_full = flags.get("full_vocab", False)
    head = weights["verifier_lm_head.weight"]
    if is_full:
        kept = torch.arange(len(head))
    else:
        head = torch.zeros_like(weights["embed_tokens.weight"]).index_copy(0, kept, head)
    verifier = make_draft(
        make_config(),
        embedding=weights["embed_tokens.weight"],
        head=head,
        norm_weight=weights["verifier_norm.weight"],
        kept_ids=torch.arange(19),
        loss_decay=1.0,
    ).verifier
    config = make_block_config(
        block_size=4,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        draft_vocab_size=len(kept),
        mask_token_id=about["mask_token_id"],
    )
    t2d = torch.zeros(37, dtype=torch.bool).index_fill_(0, kept, True)
    vocab_map = VocabMap(kept - torch.arange(len(kept)), t2d)
    decay = LossWeights(gamma=about["gamma"])
    draft: DFlashTraining
    if "markov_head_type" in flags:
        shared = {field.name: getattr(config, field.name) for field in fields(config)}
        own = DSparkConfig(
            **shared, markov_rank=7, has_confidence=True, markov_head_type=flags["markov_head_type"]
        )
        draft = DSparkTraining(
            own, verifier, vocab_map, parts=LossParts(0.1, 0.9, 1.0), weights=decay, num_anchors=9
        )
    else:
        is_dpace = flags.get("per_position_loss_weight") == "dpace"
        draft = DFlashTraining(
            config,
            verifier,
            vocab_map,
            loss=LOSSES[flags.get("loss", "kl")],
            weights=LossWeights(gamma=None, alpha=0.5) if is_dpace else decay,
            num_anchors=9,
        )
    draft.load_state_dict({name: weights[name] for name in draft.config.tensor_shapes()})
    return draft


def documents(inputs: Mapping[str, Tensor], lengths: list[int]) -> list[Sample]:
    """The samples that upstream packed."""
    parts = {
        name: inputs[name].split(lengths)
        for name in ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_states")
    }
    return [
        Sample(
            input_ids=parts["input_ids"][i],
            loss_mask=parts["loss_mask"][i],
            aux_hidden_states=parts["aux_hidden_states"][i].split(24, dim=1),
            last_hidden_states=parts["last_hidden_states"][i],
            is_normed=False,
        )
        for i in range(len(lengths))
    ]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_logits_and_gradients_equal_upstreams(variant: str, kernels: str) -> None:
    draft, inputs = build_draft(variant), parts_of(variant, "inputs")
    draft.use_fast_kernels = kernels == "fast"
    lengths = read_record()[1]["lengths"]
    # A document's first token has no position here, and that of token t is at t - 1.
    before = torch.bucketize(inputs["anchors"], torch.tensor(lengths).cumsum(0), right=True) + 1
    batch = replace(pack(*documents(inputs, lengths)), anchors=inputs["anchors"] - before)
    num_scored = draft.count_scored(batch)
    # Upstream divides by the number of scored tokens and 1e-5, we by the sum of their weights.
    weights = torch.tensor(draft.loss_weights) / (num_scored.sum() + 1e-5)

    sums = draft(batch, weights)
    sums.loss.backward()

    outputs, theirs = parts_of(variant, "outputs"), parts_of(variant, "gradients")
    assert int(num_scored.sum()) == len(inputs["anchors"]) * draft.config.num_draft_tokens
    torch.testing.assert_close(sums.loss.detach(), outputs["loss"], rtol=RTOL, atol=0)
    with torch.no_grad():
        own = draft.logits(draft.predict(batch, find_blocks(batch, draft.config.num_draft_tokens)))
    exact = outputs["logits"][:, draft.config.first_slot :]
    torch.testing.assert_close(own, exact, rtol=RTOL, atol=RTOL * float(exact.abs().max()))
    grads = {name: p.grad for name, p in draft.named_parameters()}
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        assert grad is not None, name
        # Small entries are differences of large ones.
        scale = float(theirs[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(grad, theirs[name], rtol=RTOL, atol=RTOL * scale, msg=name)
