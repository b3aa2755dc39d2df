"""Drafts of other trainers, and what is refused of them."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.rope import find_frequencies
from tests.tiny_drafts import make_config, make_draft, write_folder
from tests.tiny_run import write_verifier

VERIFIER = Overrides(verifier_name_or_path="example/verifier", verifier_architectures=("Any",))


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
    return str(write_folder(folder, content, tensors))


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
    assert isinstance(source.config, Eagle3Config)
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
    given = Overrides(
        verifier_name_or_path=str(tmp_path / "verifier"),
        read_verifier=lambda name: read_verifier_config(
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

    source = read_draft(folder, Overrides(), flag="CHECKPOINT")

    assert source.kind == "speculators"
    assert source.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (source.config.head_dim, source.config.rms_norm_eps) == (8, 1e-6)
    assert source.config.target_layer_ids == (1, 4, 7)
    assert source.config.num_draft_tokens == 5
    assert source.config.verifier_name_or_path == "some/verifier"
    assert source.embedding is not None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_window_of_upstreams_default_draft_is_read(tmp_path: Path, model_type: str) -> None:
    # Upstream 0.9.0 writes all three; its draft with full attention has the size, too.
    config = make_config(arch=model_type, target_layer_ids=(1, 4, 7))
    tensors = {name: torch.ones(shape) for name, shape in config.tensor_shapes().items()}
    maps = {"d2t": torch.arange(19), "t2d": torch.arange(37) % 2 == 0}
    windows = []
    for kind in ("sliding_attention", "full_attention"):
        content = upstream_config(
            model_type=model_type,
            layer_types=[kind],
            sliding_window=2048,
            use_sliding_window=kind == "sliding_attention",
            max_window_layers=28,
        )

        folder = write(tmp_path / kind, content, tensors | maps)

        windows.append(read_draft(folder, Overrides(), flag="CHECKPOINT").config.windows)
    assert windows == [(2048,), (None,)]


def test_a_size_without_kinds_of_layers_is_no_window(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    # As engines read it.
    folder = write(tmp_path / "upstream", upstream_config(sliding_window=7), tensors)

    assert read_draft(folder, Overrides(), flag="CHECKPOINT").config.windows == (None,)


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
        "has no verifier",
    ),
    "another algorithm": (
        lambda c, _: c.update(speculators_model_type="mtp"),
        "of algorithm `mtp`, expected `eagle3`, `dflash`, `dspark`, `peagle`",
    ),
    "no layers": (lambda c, _: c.pop("transformer_layer_config"), "lacks `transformer_layer"),
    "biases": (
        lambda c, _: c["transformer_layer_config"].update(attention_bias=True),
        "has `attention_bias` `True`",
    ),
    "a window without a size": (
        lambda c, _: c["transformer_layer_config"].update(layer_types=["sliding_attention"]),
        "has `transformer_layer_config.sliding_window` `None`, expected a size",
    ),
    "a window of no tokens": (
        lambda c, _: c["transformer_layer_config"].update(
            layer_types=["sliding_attention"], sliding_window=0
        ),
        "has `transformer_layer_config.sliding_window` `0`",
    ),
    "windows of more layers": (
        lambda c, _: c["transformer_layer_config"].update(
            layer_types=["sliding_attention"] * 2, sliding_window=4
        ),
        "expected one value for each of 1 layers",
    ),
    "chunks of attention": (
        lambda c, _: c["transformer_layer_config"].update(layer_types=["chunked_attention"]),
        "has `layer_types` `chunked_attention`",
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
        lambda _, x: x.update({"layers.0.mlp.scale": torch.ones(3)}),
        "unknown tensor `layers.0.mlp.scale`",
    ),
    "a bias of qwen2": (
        lambda _, x: x.update({"layers.0.self_attn.q_proj.bias": torch.ones(48)}),
        "has a bias `layers.0.self_attn.q_proj.bias`",
    ),
    "one tensor for three projections": (
        lambda _, x: x.update({"layers.0.self_attn.qkv_proj.weight": torch.ones(80, 48)}),
        "`layers.0.self_attn.qkv_proj.weight`, fused projections",
    ),
    "fp8 weights": (
        lambda _, x: x.update({"fc.weight": x["fc.weight"].to(torch.float8_e4m3fn)}),
        "`fc.weight` quantised to float8_e4m3fn",
    ),
    "scales": (
        lambda _, x: x.update({"fc.weight_scale": torch.ones(1)}),
        "is quantised: it has `fc.weight_scale`",
    ),
    "a quantisation": (
        lambda c, _: c.update(quantization_config={"quant_method": "fp8"}),
        "is quantised with `fp8`",
    ),
    "more layers than weights": (
        lambda c, _: c["transformer_layer_config"].update(num_hidden_layers=20_000),
        "`num_hidden_layers` is 20,000, and the weights have 1 layers",
    ),
    "layers beyond counting": (
        lambda c, _: c["transformer_layer_config"].update(num_hidden_layers=2**31 - 1),
        "`num_hidden_layers` is 2,147,483,647",
    ),
    "sizes beyond counting": (
        lambda c, _: c["transformer_layer_config"].update(intermediate_size=2**31 - 1),
        r"has `layers.0.mlp.down_proj.weight` \(24, 40\), expected",
    ),
    "a vocabulary beyond memory": (
        lambda c, x: (c["transformer_layer_config"].update(vocab_size=2**31 - 1), x.pop("t2d")),
        "a vocabulary of 2,147,483,647 tokens",
    ),
    "a size beyond 31 bits": (
        lambda c, _: c["transformer_layer_config"].update(hidden_size=10**15),
        "`transformer_layer_config.hidden_size` `1000000000000000`, expected a whole number",
    ),
    "a size of no number": (
        lambda c, _: c["transformer_layer_config"].update(hidden_size="wide"),
        "`transformer_layer_config.hidden_size` `wide`, expected a whole number",
    ),
    "a size that is a switch": (
        lambda c, _: c["transformer_layer_config"].update(num_attention_heads=True),
        "`transformer_layer_config.num_attention_heads` `True`",
    ),
    "a negative norm_eps": (
        lambda c, _: c["transformer_layer_config"].update(rms_norm_eps=-1e-5),
        "`transformer_layer_config.rms_norm_eps` `-1e-05`, expected a positive number",
    ),
    "a flag of no switch": (
        lambda c, _: c.update(norm_before_residual="perhaps"),
        "`norm_before_residual` `perhaps`, expected `true` or `false`",
    ),
    "a list for an object": (
        lambda c, _: c.update(speculators_config=[]),
        r"`speculators_config` `\[\]`, expected an object",
    ),
    "layers in a list": (
        lambda c, _: c.update(transformer_layer_config=[c["transformer_layer_config"]]),
        "`transformer_layer_config`.*expected an object",
    ),
    "methods in an object": (
        lambda c, _: c["speculators_config"].update(proposal_methods={"greedy": 5}),
        "`speculators_config.proposal_methods`.*expected a list of objects",
    ),
    "a name that is a number": (
        lambda c, _: c["speculators_config"]["verifier"].update(name_or_path=7),
        "`speculators_config.verifier.name_or_path` `7`, expected text",
    ),
    "layer ids in an object": (
        lambda c, _: c.update(eagle_aux_hidden_state_layer_ids={"0": 1}),
        "expected a list of layer ids",
    ),
    "layer ids that are switches": (
        lambda c, _: c.update(eagle_aux_hidden_state_layer_ids=[False, True, 3]),
        "expected a list of layer ids",
    ),
    "a negative layer id": (
        lambda c, _: c.update(eagle_aux_hidden_state_layer_ids=[-1, 2, 3]),
        "expected a list of layer ids",
    ),
    "a scale of logits": (
        lambda c, _: c["transformer_layer_config"].update(logit_scale=0.5),
        "has `logit_scale` `0.5`",
    ),
    "a window of qwen2": (
        lambda c, _: c["transformer_layer_config"].update(use_sliding_window=True),
        "has `use_sliding_window` `True`",
    ),
    "layers of gemma": (
        lambda c, _: c["transformer_layer_config"].update(model_type="gemma2"),
        "layers of type `gemma2`, expected one of `llama`",
    ),
    "a token twice": (
        lambda _, x: (x["d2t"][3:5].copy_(torch.tensor([4, 3])), x.pop("t2d")),
        "maps to 1 ids twice",
    ),
    "offsets that are no whole numbers": (
        lambda _, x: x.update(d2t=x["d2t"].float()),
        "`d2t` is .* of float32",
    ),
    "another shape": (
        lambda _, x: x.update({"fc.weight": torch.ones(24, 50)}),
        r"has `fc.weight` \(24, 50\), expected \(24, 72\)",
    ),
    "absolute d2t": (
        lambda _, x: x["d2t"].add_(torch.arange(19)),
        "draft vocabulary .* is broken: `d2t` maps to ids from 0 to 54, expected 0 to 36",
    ),
    "absolute d2t by frequency": (
        lambda _, x: (x["d2t"][:2].copy_(torch.tensor([2, 0])), x.pop("t2d")),
        "`d2t` contains ids, expected offsets",
    ),
    "another t2d": (
        lambda _, x: x["t2d"].logical_not_(),
        "`d2t` contains other tokens than `t2d`",
    ),
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
        read_draft(folder, Overrides(), flag="CHECKPOINT")

    assert error.value.hint


@pytest.mark.parametrize("has_t2d", [False, True])
def test_a_vocabulary_in_order_of_frequency_is_sorted_with_the_rows_of_the_head(
    tmp_path: Path, tensors: dict[str, Tensor], has_t2d: bool
) -> None:
    ids = torch.arange(0, 37, 2)[torch.randperm(19, generator=torch.Generator().manual_seed(4))]
    head = tensors["lm_head.weight"]
    changed = tensors | {"d2t": (ids - torch.arange(19)).int()}
    if not has_t2d:
        changed.pop("t2d")
    folder = write(tmp_path / "draft", upstream_config(), changed)

    source = read_draft(folder, Overrides(), flag="CHECKPOINT")

    assert source.vocab_map.kept_ids.tolist() == list(range(0, 37, 2))
    for row, token in zip(source.weights["lm_head.weight"], range(0, 37, 2), strict=True):
        assert torch.equal(row, head[ids.tolist().index(token)])
    others = source.weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(source.weights[name], tensors[name]) for name in others)


def test_values_of_another_type_are_read_where_they_have_one_meaning(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    expected = read_draft(
        write(tmp_path / "exact", upstream_config(), tensors), Overrides(), flag="CHECKPOINT"
    )
    content = upstream_config(
        hidden_size="24", num_attention_heads=6.0, rms_norm_eps="1e-5", rope_theta="500000.0",
        attention_bias="false", mlp_bias=0,
    )  # fmt: skip
    content["transformer_layer_config"] |= {"num_key_value_heads": "2", "hidden_act": "swish"}
    content |= {
        "norm_before_residual": "False",
        "fc_norm": 0,
        "norm_output": None,
        "draft_vocab_size": "19",
        "eagle_aux_hidden_state_layer_ids": ["1", 4.0, 7],
        "quantization_config": None,
    }
    content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = "5"
    content["speculators_config"]["verifier"]["architectures"] = "LlamaForCausalLM"
    folder = write(tmp_path / "draft", content, tensors)

    source = read_draft(folder, Overrides(), flag="CHECKPOINT")

    assert source.config == expected.config
    assert isinstance(source.config, Eagle3Config)
    assert source.config.norm_before_residual is False


@pytest.mark.parametrize("model_type", ["phi3", "qwen2", "mistral", "gpt_oss", "qwen3"])
def test_llama_layers_are_read_under_the_type_of_their_verifier(
    tmp_path: Path, tensors: dict[str, Tensor], model_type: str
) -> None:
    content = plain_config(model_type=model_type)
    folder = write(tmp_path / "draft", content, as_eagle(tensors))

    source = read_draft(folder, replace(VERIFIER, target_layer_ids=(2, 4, 6)), flag="CHECKPOINT")

    assert (
        source.config
        == read_draft(
            write(tmp_path / "llama", plain_config(), as_eagle(tensors)),
            replace(VERIFIER, target_layer_ids=(2, 4, 6)),
            flag="CHECKPOINT",
        ).config
    )
    assert source.config.arch == "llama"


@pytest.mark.parametrize(
    ("top", "nested", "expected"),
    [
        ({}, {}, None),
        ({}, {"norm_before_fc": True}, "norm_before_fc"),
        ({"use_aux_norm": True}, {}, "fc_norm"),
        ({"norm_before_residual": "true"}, {}, "norm_before_residual"),
        ({"norm_output": 1}, {"norm_output": True}, "norm_output"),
    ],
)
def test_flags_of_a_plain_draft_are_read_where_engines_look(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    top: dict[str, Any],
    nested: dict[str, Any],
    expected: str | None,
) -> None:
    changes = top | {"eagle_config": nested, "eagle_aux_hidden_state_layer_ids": [2, 4, 6]}
    extra = {
        "norm_before_fc": {"input_norm.weight": torch.ones(72)},
        "fc_norm": {f"fc_norm.{i}.weight": torch.ones(24) for i in range(3)},
    }.get(str(expected), {})
    folder = write(tmp_path / "draft", plain_config(**changes), as_eagle(tensors) | extra)

    config = read_draft(folder, VERIFIER, flag="CHECKPOINT").config

    keys = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    assert [key for key in keys if getattr(config, key)] == [expected] * (expected is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm_before_fc": False, "eagle_config": {"norm_before_fc": True}},
            "`norm_before_fc` both on and off",
        ),
        ({"eagle_config": []}, "`eagle_config`.*expected an object"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "reads no aux hidden states"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "1,3,5"}}, "list of layer ids"),
        ({"architectures": {"0": "LlamaForCausalLMEagle3"}, "draft_vocab_size": None}, "strings"),
    ],
)
def test_a_plain_config_with_two_meanings_or_none_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "draft", plain_config(**changes), as_eagle(tensors))

    with pytest.raises(CheckpointError, match=message):
        read_draft(folder, replace(VERIFIER, target_layer_ids=(2, 4, 6)), flag="CHECKPOINT")


def test_what_no_tensor_shows_and_is_not_written_is_named(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    content = upstream_config(rope_theta=None, rms_norm_eps=None, max_position_embeddings=None)
    folder = write(tmp_path / "draft", content, tensors)
    whole = write(tmp_path / "whole", upstream_config(), tensors)

    source = read_draft(folder, Overrides(), flag="CHECKPOINT")

    assert source.assumed == {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    }  # fmt: skip
    assert source.assumption is not None
    assert "`rms_norm_eps` 1e-06, `max_position_embeddings` 2048, `rope_theta` 10000" in (
        source.assumption
    )
    assert read_draft(whole, Overrides(), flag="CHECKPOINT").assumption is None


ODD_VALUES: list[Any] = [
    None, True, 0, 1, -1, 3.5, "", "x", "12", float("nan"), float("inf"), 1e308, 10**30, 2**31, [],
    [1], [[1]], ["a"], {}, {"a": 1}, [None], "longrope",
]  # fmt: skip


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every object and list of a config, with each of its keys."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    for key in keys:
        if isinstance(content[key], dict | list):
            found += places(content[key])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_config_with_an_odd_value_is_read_or_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], seed: int
) -> None:
    rope = {"type": "yarn", "factor": 4.0, "beta_fast": 32, "truncate": True}
    made = [
        plain_config(
            rope_scaling=rope, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}
        ),
        upstream_config(rope_scaling=rope),
    ]
    given = replace(VERIFIER, target_layer_ids=(2, 4, 6))
    write(tmp_path / "draft", {}, tensors)
    generator = torch.Generator().manual_seed(seed)

    def choose(choices: list[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    num_read, refused = 0, []
    for _ in range(150):
        content = deepcopy(choose(made))
        part, key = choose(places(content))
        part[key] = deepcopy(choose(ODD_VALUES))
        (tmp_path / "draft/config.json").write_text(json.dumps(content))
        try:
            source = read_draft(str(tmp_path / "draft"), given, flag="CHECKPOINT")
        except CheckpointError as error:
            refused.append(error.hint)
        else:
            num_read += 1
            json.dumps(source.config.to_json(), allow_nan=False)
            assert bool(find_frequencies(source.config)[0].isfinite().all())

    assert num_read > 10
    assert len(refused) > 50
    assert all(refused)


@pytest.mark.parametrize("case", ["tied", "equal", "other", "no embedding", "fewer tokens"])
def test_a_tied_head_is_the_embedding(
    tmp_path: Path, tensors: dict[str, Tensor], case: str
) -> None:
    embedding = torch.randn(37, 24)
    content = upstream_config(tie_word_embeddings=True)
    changed = dict(tensors)
    if case != "fewer tokens":
        content["draft_vocab_size"] = 37
        del changed["d2t"], changed["t2d"], changed["lm_head.weight"]
    if case not in ("fewer tokens", "no embedding"):
        changed["embed_tokens.weight"] = embedding
    if case in ("equal", "other"):
        changed["lm_head.weight"] = embedding.clone() if case == "equal" else torch.ones(37, 24)
    folder = write(tmp_path / "draft", content, changed)

    if case in ("other", "no embedding"):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            read_draft(folder, Overrides(), flag="CHECKPOINT")
        return
    source = read_draft(folder, Overrides(), flag="CHECKPOINT")

    own = tensors["lm_head.weight"] if case == "fewer tokens" else embedding
    assert torch.equal(source.weights["lm_head.weight"], own)


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
    draft: Eagle3Training = make_draft(
        config,
        embedding=rows,
        head=rows,
        norm_weight=None,
        kept_ids=torch.arange(0, 37, 2),
        loss_decay=1.0,
    )

    shapes = {name: tuple(x.shape) for name, x in draft.named_parameters()}

    assert shapes == config.tensor_shapes()
