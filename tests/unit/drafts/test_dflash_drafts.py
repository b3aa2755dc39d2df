"""DFlash drafts of other trainers, and what is refused of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import CheckpointError
from tests.tiny_dflash import KEPT_IDS, make_block_config
from tests.tiny_drafts import write_folder

VERIFIER = Overrides(verifier_name_or_path="example/verifier", verifier_architectures=("Any",))


def make_tensors(config: DFlashConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator)
        for name, shape in config.tensor_shapes().items()
    }
    if config.owns_head:
        made |= {"d2t": KEPT_IDS - torch.arange(19), "t2d": torch.arange(37) % 2 == 0}
    return made


def upstream_config(**changes: Any) -> dict[str, Any]:
    """As upstream's trainer writes it: a window for all layers, the verifier's parts by name."""
    content = make_block_config().to_json()
    layers = content["transformer_layer_config"]
    layers["rope_theta"] = layers.pop("rope_parameters")["rope_theta"]
    del layers["layer_types"], content["producer"], content["sliding_window_non_causal"]
    content |= {
        "sample_from_anchor": False,
        "max_anchors": 512,
        "architectures": ["DFlashDraftModel"],
    }
    return {key: x for key, x in (content | changes).items() if x is not None}


def test_an_upstream_draft_is_read(tmp_path: Path) -> None:
    config = make_block_config()
    tensors = make_tensors(config)
    kept = {"verifier_lm_head.weight": torch.randn(19, 24), "verifier_norm.weight": torch.ones(24)}

    draft = read_draft(str(write_folder(tmp_path, upstream_config(), tensors | kept)))

    assert draft.config == config
    assert draft.vocab_map.kept_ids.tolist() == KEPT_IDS.tolist()
    assert all(torch.equal(draft.weights[name], tensors[name]) for name in config.tensor_shapes())


def test_the_verifiers_head_saved_with_a_full_vocabulary_is_not_read(tmp_path: Path) -> None:
    config = make_block_config(draft_vocab_size=37)
    tensors = make_tensors(config) | {"lm_head.weight": torch.randn(37, 24)}

    draft = read_draft(str(write_folder(tmp_path, config.to_json(), tensors)))

    assert draft.vocab_map.is_full
    assert not draft.config.owns_head
    assert "lm_head.weight" not in draft.weights


@pytest.mark.parametrize(
    ("layers", "window", "is_causal"),
    [
        ({}, None, False),
        ({"layer_types": ["full_attention"] * 2}, None, False),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 64}, 64, True),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64, "is_causal": False},
            64,
            False,
        ),
    ],
)
def test_a_plain_draft_is_read_as_its_engines_compute_it(
    tmp_path: Path, layers: dict[str, Any], window: int | None, is_causal: bool
) -> None:
    config = make_block_config(draft_vocab_size=37)
    content = {
        "architectures": ["DFlashDraftModel"],
        **config.layers_json(vocab_size=37),
        "block_size": 5,
        "dflash_config": {"target_layer_ids": [1, 3, 6], "mask_token_id": 0},
        **layers,
    }

    found = read_draft(str(write_folder(tmp_path, content, make_tensors(config))), VERIFIER).config

    assert isinstance(found, DFlashConfig)
    assert found.target_layer_ids == (2, 4, 7)
    assert (found.block_size, found.mask_token_id) == (5, 0)
    assert (found.draft_window, found.causal_block) == (window, is_causal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_from_anchor": True}, "predicts from its anchor"),
        ({"mask_token_id": None}, "has no mask_token_id"),
        ({"mask_token_id": "x"}, "expected a token id"),
        ({"aux_hidden_state_layer_ids": None}, "has no layer ids of the verifier"),
        ({"aux_hidden_state_layer_ids": [7, 4, 2]}, "not strictly ascending"),
        ({"aux_hidden_state_layer_ids": [2, 4]}, "read 3 verifier layers"),
        ({"block_size": 1}, "expected at least 2"),
        ({"speculators_model_type": "mtp"}, "is a draft of algorithm `mtp`"),
    ],
)
def test_what_this_package_does_not_compute_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path, upstream_config(**changes), make_tensors(make_block_config()))

    with pytest.raises(CheckpointError, match=message):
        read_draft(str(folder))


def test_layers_of_two_kinds_are_refused(tmp_path: Path) -> None:
    content = upstream_config()
    content["transformer_layer_config"]["layer_types"] = ["full_attention", "sliding_attention"]

    with pytest.raises(CheckpointError, match="with full attention and with windows"):
        read_draft(str(write_folder(tmp_path, content, make_tensors(make_block_config()))))
