"""P-EAGLE drafts of other trainers, and what is refused of them."""

from pathlib import Path

import pytest
import torch

from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import CheckpointError
from tests.tiny_drafts import make_config, read_folder, write_draft, write_folder
from tests.tiny_peagle import MASK, make_peagle_config

VERIFIER = Overrides(
    verifier_name_or_path="example/verifier", verifier_architectures=("LlamaForCausalLM",)
)


def test_an_upstream_draft_is_read(tmp_path: Path) -> None:
    # As speculators 0.9.0 writes it, with an embedding that it trained.
    config = make_peagle_config(num_layers=2, norm_before_residual=False)
    content, tensors = read_folder(write_draft(tmp_path / "own", config))
    # Without the value, engines take the residual of these drafts before the norm.
    del content["norm_before_residual"], content["producer"]
    content |= {"architectures": ["PEagleSpeculator"], "embed_requires_grad": True}
    embedding = torch.randn(37, 24)

    theirs = tensors | {"embed_tokens.weight": embedding}
    draft = read_draft(str(write_folder(tmp_path / "theirs", content, theirs)))

    assert draft.config == config
    assert draft.kind == "speculators"
    assert draft.embedding is not None
    assert torch.equal(draft.embedding, embedding)
    assert all(torch.equal(draft.weights[name], tensors[name]) for name in config.tensor_shapes())


@pytest.mark.parametrize("key", ["mask_token_id", "pard_token", "ptd_token_id"])
@pytest.mark.parametrize("shape", [(72,), (1, 72), (1, 1, 72)])
def test_a_plain_draft_is_read(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    config = make_peagle_config(num_layers=2, norm_before_residual=False)
    content, tensors = read_folder(write_draft(tmp_path / "own", config))
    plain = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **content["transformer_layer_config"],
        "draft_vocab_size": 19,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 7],
        key: MASK,
    }
    mask = tensors["mask_hidden"]
    renamed = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    renamed["mask_hidden"] = mask.reshape(shape)

    draft = read_draft(str(write_folder(tmp_path / "plain", plain, renamed)), VERIFIER)

    assert draft.config == config
    assert draft.kind == "peagle"
    assert torch.equal(draft.weights["mask_hidden"], mask)


def test_a_plain_draft_without_a_mask_token_is_of_eagle_3(tmp_path: Path) -> None:
    content, tensors = read_folder(write_draft(tmp_path / "own", make_config()))
    plain = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **content["transformer_layer_config"],
        "draft_vocab_size": 19,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 7],
        "ptd_token_id": None,
    }

    draft = read_draft(str(write_folder(tmp_path / "plain", plain, tensors)), VERIFIER)

    assert draft.config.algorithm == "eagle3"


@pytest.mark.parametrize(
    ("mask", "message"), [(None, "lacks `mask_token_id`"), (-1, "a token id"), (True, "a token id")]
)
def test_a_draft_without_a_mask_token_is_refused(
    mask: object, message: str, tmp_path: Path
) -> None:
    content, tensors = read_folder(write_draft(tmp_path / "own", make_peagle_config()))
    content["mask_token_id"] = mask

    with pytest.raises(CheckpointError, match=message):
        read_draft(str(write_folder(tmp_path / "draft", content, tensors)))


def test_a_draft_without_the_masks_states_is_refused(tmp_path: Path) -> None:
    content, tensors = read_folder(write_draft(tmp_path / "own", make_peagle_config()))
    del tensors["mask_hidden"]

    with pytest.raises(CheckpointError, match="lacks `mask_hidden`"):
        read_draft(str(write_folder(tmp_path / "draft", content, tensors)))
