"""Drafts of other trainers, and what is refused of them."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.draft_config import Given
from speculators_cli.core.models.draft_source import read_draft
from speculators_cli.core.models.eagle3 import Eagle3Draft
from tests.drafts import make_config, make_draft
from tests.tiny import write_verifier

VERIFIER = Given(verifier_name_or_path="example/verifier", verifier_architectures=("Any",))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A draft's, under the names of a checkpoint; it keeps every other verifier token."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator)
        for name, shape in make_config().tensor_shapes().items()
    }
    t2d = torch.arange(37) % 2 == 0
    return made | {"d2t": torch.arange(19), "t2d": t2d}


def plain_config(**changes: Any) -> dict[str, Any]:
    """As EAGLE's trainer writes it: theta at the top, no layer ids, no verifier."""
    content = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "vocab_size": 37,
        "draft_vocab_size": 19,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    return {key: x for key, x in (content | changes).items() if x is not None}


def upstream_config(**changes: Any) -> dict[str, Any]:
    """As upstream speculators writes it; `changes` go to the decoder layers' part."""
    layers = plain_config(**changes)
    for key in ("architectures", "draft_vocab_size"):
        layers.pop(key)
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": 19,
        "norm_before_residual": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 7],
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "some/verifier", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layers,
    }


def write(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def as_eagle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_an_eagle_checkpoint_is_read_under_our_names(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str, is_pickled: bool
) -> None:
    named = {f"{prefix}{name}": x for name, x in as_eagle(tensors).items()}
    folder = write(tmp_path / "eagle", plain_config(), named)
    if is_pickled:
        (tmp_path / "eagle/model.safetensors").unlink()
        state: Any = OrderedDict(named)
        state._metadata = OrderedDict({"": {"version": 1}})
        torch.save(state, tmp_path / "eagle/pytorch_model.bin")

    source = read_draft(folder, replace(VERIFIER, target_layer_ids=(2, 4, 6)), flag="CHECKPOINT")

    assert source.kind == "eagle3"
    assert source.embedding is None
    assert source.config.target_layer_ids == (2, 4, 6)
    assert source.config.rope_parameters["rope_theta"] == 500000.0
    assert source.config.norm_before_residual is False
    assert source.vocab_map.kept_ids.tolist() == list(range(0, 37, 2))
    assert source.weights.keys() == tensors.keys() - {"d2t", "t2d"}
    assert all(torch.equal(source.weights[name], tensors[name]) for name in source.weights)


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 6]}, (2, 4, 6)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}}, (2, 4, 6)),
    ],
)
def test_layer_ids_are_read_in_the_convention_of_their_key(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, Any], ids: tuple[int, ...]
) -> None:
    folder = write(tmp_path / "eagle", plain_config(**changes), as_eagle(tensors))

    source = read_draft(folder, VERIFIER, flag="CHECKPOINT")

    assert source.config.target_layer_ids == ids


def test_without_layer_ids_they_are_those_of_the_engines(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    from speculators_cli.core.models.verifier import read_verifier_config
    from speculators_cli.core.models.verifier_files import VerifierFiles

    write_verifier(tmp_path / "verifier")  # of 9 layers
    folder = write(tmp_path / "eagle", plain_config(), as_eagle(tensors))
    given = Given(
        verifier_name_or_path=str(tmp_path / "verifier"),
        ask_verifier=lambda name: read_verifier_config(
            VerifierFiles(name), trust_remote_code=False
        ),
    )

    source = read_draft(folder, given, flag="CHECKPOINT")

    assert source.config.target_layer_ids == (2, 4, 6)
    assert source.config.verifier_architectures == ("LlamaForCausalLM",)


def test_an_upstream_checkpoint_is_read_with_the_defaults_of_its_family(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    # Its first versions wrote only what differs from the family, and a gain in every layer.
    content = upstream_config(rope_theta=None, head_dim=None, rms_norm_eps=None, hidden_act=None)
    content["transformer_layer_config"]["num_attention_heads"] = 3
    extra = {"verifier_norm.weight": torch.ones(24), "embed_tokens.weight": torch.randn(37, 24)}
    folder = write(tmp_path / "upstream", content, tensors | extra | resized(tensors))

    source = read_draft(folder, Given(), flag="CHECKPOINT")

    assert source.kind == "speculators"
    assert source.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (source.config.head_dim, source.config.rms_norm_eps) == (8, 1e-6)
    assert source.config.target_layer_ids == (1, 4, 7)
    assert source.config.ttt_steps == 5
    assert source.config.verifier_name_or_path == "some/verifier"
    assert source.embedding is not None


def resized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three heads in place of six."""
    prefix = "layers.0.self_attn."
    q, o = tensors[f"{prefix}q_proj.weight"], tensors[f"{prefix}o_proj.weight"]
    return {
        f"{prefix}q_proj.weight": q[:24].contiguous(),
        f"{prefix}o_proj.weight": o[:, :24].contiguous(),
    }


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = write(tmp_path / "eagle", plain_config(), as_eagle(tensors))
    (tmp_path / "eagle/model.safetensors").unlink()
    torch.save(as_eagle(tensors) | {"x": Hostile()}, tmp_path / "eagle/pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"would run `\w+\.mkdir`|pickle operation"):
        read_draft(folder, replace(VERIFIER, target_layer_ids=(2, 4, 6)), flag="CHECKPOINT")

    assert not (tmp_path / "ran").exists()


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "no verifier": (
        lambda c, _: c["speculators_config"].update(verifier={}),
        "does not say which verifier",
    ),
    "another algorithm": (
        lambda c, _: c.update(speculators_model_type="dflash"),
        "of algorithm `dflash`, expected `eagle3`",
    ),
    "no layers": (lambda c, _: c.pop("transformer_layer_config"), "lacks `transformer_layer"),
    "biases": (
        lambda c, _: c["transformer_layer_config"].update(attention_bias=True),
        "has `attention_bias` `True`",
    ),
    "a window": (
        lambda c, _: c["transformer_layer_config"].update(layer_types=["sliding_attention"]),
        "sliding_attention",
    ),
    "another activation": (
        lambda c, _: c["transformer_layer_config"].update(hidden_act="gelu"),
        "has `hidden_act` `gelu`",
    ),
    "half a rotation": (
        lambda c, _: c["transformer_layer_config"].update(
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        ),
        "has `partial_rotary_factor` `0.5`",
    ),
    "layers out of order": (
        lambda c, _: c.update(eagle_aux_hidden_state_layer_ids=[7, 4, 1]),
        "not strictly ascending",
    ),
    "a missing tensor": (lambda _, x: x.pop("norm.weight"), "lacks `norm.weight`"),
    "an unknown tensor": (
        lambda _, x: x.update({"layers.0.mlp.bias": torch.ones(3)}),
        "unknown tensor `layers.0.mlp.bias`",
    ),
    "another shape": (
        lambda _, x: x.update({"fc.weight": torch.ones(24, 48)}),
        r"has `fc.weight` \(24, 48\), expected \(24, 72\)",
    ),
    "absolute d2t": (lambda _, x: x["d2t"].add_(torch.arange(19)), "draft vocabulary"),
    "another t2d": (lambda _, x: x["t2d"].logical_not_(), "draft vocabulary"),
    "no d2t": (lambda _, x: x.pop("d2t"), "lacks `d2t`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_draft_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], case: str
) -> None:
    change, message = REFUSED[case]
    content = upstream_config()
    change(content, tensors)
    folder = write(tmp_path / "draft", content, tensors)

    with pytest.raises(CheckpointError, match=message) as error:
        read_draft(folder, Given(), flag="CHECKPOINT")

    assert error.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3},
        {"arch": "qwen3", "num_layers": 2},
        {"fc_norm": True},
        {"norm_before_fc": True, "target_layer_ids": (1, 2, 3, 4)},
    ],
)
def test_the_table_of_shapes_is_that_of_the_model(changes: dict[str, Any]) -> None:
    config: Eagle3Config = make_config(**changes)
    rows = torch.randn(37, 24)
    draft: Eagle3Draft = make_draft(
        config,
        embedding=rows,
        head=rows,
        norm_gain=None,
        kept_ids=torch.arange(0, 37, 2),
        loss_decay=1.0,
    )

    shapes = {name: tuple(x.shape) for name, x in draft.named_parameters()}

    assert shapes == config.tensor_shapes()
