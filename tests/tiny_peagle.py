"""P-EAGLE drafts over a random verifier; tiny, with dimensions that all differ."""

from dataclasses import fields
from typing import Any

import torch

from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from tests.tiny_drafts import filled_draft, make_config

KEPT_IDS = torch.arange(0, 37, 2)
MASK = 35  # no draft token


def make_peagle_config(**changes: Any) -> PEagleConfig:
    """A `PEagleConfig` of hidden size 24 and three tokens; any field can be given."""
    mask = changes.pop("mask_token_id", MASK)
    eagle = make_config(**changes)
    shared = {field.name: getattr(eagle, field.name) for field in fields(eagle)}
    return PEagleConfig(**shared, mask_token_id=mask)


def filled_peagle(config: PEagleConfig, rng: torch.Generator) -> PEagleTraining:
    """A draft with every weight random, so that no norm weight is one and no path is silent."""
    draft = filled_draft(config, rng, kept_ids=KEPT_IDS)
    assert isinstance(draft, PEagleTraining)
    return draft
