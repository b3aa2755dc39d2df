"""DFlash drafts over a random verifier; tiny, with dimensions that all differ."""

from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.losses import LOSSES
from tests.tiny_drafts import fill_weights, filled_draft, make_config

KEPT_IDS = torch.arange(0, 37, 2)
MASK = 35  # no draft token, and none that samples of `make_text` have
DECAY = LossWeights(gamma=2.0)


def make_block_config(**changes: Any) -> DFlashConfig:
    """A `DFlashConfig` of hidden size 24 and two layers; any field can be given."""
    eagle = make_config()
    shared = (
        "hidden_size target_hidden_size intermediate_size num_heads num_kv_heads head_dim "
        "rms_norm_eps rope_parameters max_position_embeddings vocab_size draft_vocab_size "
        "target_layer_ids verifier_name_or_path verifier_architectures"
    )
    fields = {name: getattr(eagle, name) for name in shared.split()}
    own = {"arch": "qwen3", "num_layers": 2, "block_size": 5, "mask_token_id": MASK}
    return DFlashConfig(**(fields | own | changes))


def filled_blocks(
    config: DFlashConfig,
    rng: torch.Generator,
    *,
    loss: str = "kl",
    weights: LossWeights = DECAY,
    num_anchors: int = 100,
    kept_ids: Tensor | None = None,
) -> DFlashTraining:
    """A draft with every weight random, so that no norm weight is one and no path is silent."""
    if kept_ids is None:
        kept_ids = KEPT_IDS if config.owns_head else torch.arange(config.vocab_size)
    verifier = filled_draft(make_config(), rng, kept_ids=KEPT_IDS).verifier
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, kept_ids, True)
    draft = DFlashTraining(
        config,
        verifier,
        VocabMap(kept_ids - torch.arange(len(kept_ids)), t2d),
        loss=LOSSES[loss],
        weights=weights,
        num_anchors=num_anchors,
    )
    fill_weights(draft, rng)
    return draft
