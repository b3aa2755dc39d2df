"""The contract of an export: every single fault of a folder is found without an engine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.export import export
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.settings.export import ExportSettings
from tests.tiny_drafts import read_folder, write_folder
from tests.tiny_run import DRAFT_VOCAB, VOCAB, TinyInputs


@pytest.fixture(scope="module")
def exported(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in float32; nothing may be written into it."""
    folder = tmp_path_factory.mktemp("exported")
    run = {"save_path": folder / "checkpoints", "epochs": 1}
    train(shared_inputs.settings(run=run), progress=SilentProgress())
    content = {
        "source": {"checkpoint": str(folder / "checkpoints")},
        "export": {"output_dir": folder / "served", "dtype": "float32"},
    }
    export(ExportSettings.model_validate(content), progress=SilentProgress())
    return folder / "served"


@pytest.fixture
def served(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, tmp_path / "served")


def change(key: str, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """A fault: one value of config.json is another, or (None) missing."""

    def fault(content: dict[str, Any], _: dict[str, Tensor]) -> None:
        *parents, name = key.split(".")
        for parent in parents:
            content = content[int(parent)] if isinstance(content, list) else content[parent]
        if value is None:
            del content[name]
        else:
            content[name] = value

    return fault


def put(name: str, make: Callable[[dict[str, Tensor]], Tensor | None]) -> Any:
    """A fault: one tensor is another, or (None) missing."""

    def fault(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensor = make(tensors)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()

    return fault


LAYERS = "transformer_layer_config"
NAMES = [
    "d2t",
    "t2d",
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    "layers.0.hidden_norm.weight",
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
]
FAULTS: dict[str, Any] = {
    **{f"no {name}": put(name, lambda _: None) for name in NAMES},
    "extra tensor": put("layers.1.mlp.up_proj.weight", lambda x: x["fc.weight"].clone()),
    "verifier's norm left in": put("verifier_norm.weight", lambda x: x["norm.weight"].clone()),
    "prefixed tensor": put("model.fc.weight", lambda x: x["fc.weight"].clone()),
    "fc of two layers": put("fc.weight", lambda x: x["fc.weight"][:, :48]),
    "q of one width": put("layers.0.self_attn.q_proj.weight", lambda _: torch.zeros(48, 24)),
    "swapped axes": put("lm_head.weight", lambda x: x["lm_head.weight"].T),
    "whole integers": put("norm.weight", lambda x: x["norm.weight"].long()),
    "absolute d2t": put("d2t", lambda x: x["d2t"] + torch.arange(DRAFT_VOCAB)),
    "shifted d2t": put("d2t", lambda x: x["d2t"] + 1),
    "negative d2t": put("d2t", lambda x: x["d2t"] - 1),
    "int32 d2t": put("d2t", lambda x: x["d2t"].int()),
    "short d2t": put("d2t", lambda x: x["d2t"][:-1]),
    "inverted t2d": put("t2d", lambda x: ~x["t2d"]),
    "no layer ids": change("eagle_aux_hidden_state_layer_ids", None),
    "null layer ids": lambda content, _: content.update(eagle_aux_hidden_state_layer_ids=None),
    "repeated layer ids": change("eagle_aux_hidden_state_layer_ids", [3, 3, 7]),
    "descending layer ids": change("eagle_aux_hidden_state_layer_ids", [7, 5, 3]),
    "four layer ids": change("eagle_aux_hidden_state_layer_ids", [1, 3, 5, 7]),
    "four aux states": change(f"{LAYERS}.num_aux_hidden_states", 4),
    "no RoPE": change(f"{LAYERS}.rope_parameters", None),
    "RoPE without theta": change(f"{LAYERS}.rope_parameters", {"rope_type": "default"}),
    "RoPE without a type": change(f"{LAYERS}.rope_parameters", {"rope_theta": 50000.0}),
    "RoPE of texts": change(f"{LAYERS}.rope_parameters.rope_theta", "50000.0"),
    "RoPE in a list": change(f"{LAYERS}.rope_parameters", ["default", 50000.0]),
    "RoPE with a factor of text": change(
        f"{LAYERS}.rope_parameters", {"rope_type": "linear", "rope_theta": 5e4, "factor": "2.0"}
    ),
    "RoPE with a list of texts": change(
        f"{LAYERS}.rope_parameters",
        {"rope_type": "longrope", "rope_theta": 5e4, "original_max_position_embeddings": 64}
        | {"short_factor": ["1.0"] * 4, "long_factor": [2.0] * 4},
    ),
    "RoPE of part of each head": change(f"{LAYERS}.rope_parameters.partial_rotary_factor", 0.5),
    "RoPE of sections": change(f"{LAYERS}.rope_parameters.mrope_section", [2, 1, 1]),
    "layer ids of text": change("eagle_aux_hidden_state_layer_ids", ["3", "5", "7"]),
    "layer ids of two types": change("eagle_aux_hidden_state_layer_ids", [3, "5", None]),
    "layer ids in an object": change("eagle_aux_hidden_state_layer_ids", {"0": 3}),
    "a size of text": change(f"{LAYERS}.hidden_size", "24"),
    "rms_norm_eps of text": change(f"{LAYERS}.rms_norm_eps", "1e-06"),
    "a switch of text": change("norm_before_residual", "true"),
    "a window without a size": change(f"{LAYERS}.layer_types", ["sliding_attention"]),
    "chunks of attention": change(f"{LAYERS}.layer_types", ["chunked_attention"]),
    "no kinds of layers": change(f"{LAYERS}.layer_types", []),
    "a kind of layer as text": change(f"{LAYERS}.layer_types", "full_attention"),
    "mlp biases": change(f"{LAYERS}.mlp_bias", True),
    "a tied head": change(f"{LAYERS}.tie_word_embeddings", True),
    "no head_dim": change(f"{LAYERS}.head_dim", None),
    "another head_dim": change(f"{LAYERS}.head_dim", 4),
    "no rms_norm_eps": change(f"{LAYERS}.rms_norm_eps", None),
    "another activation": change(f"{LAYERS}.hidden_act", "gelu"),
    "biases": change(f"{LAYERS}.attention_bias", True),
    "layers of mistral": change(f"{LAYERS}.model_type", "mistral"),
    "layers of qwen3": change(f"{LAYERS}.model_type", "qwen3"),
    "two layers": change(f"{LAYERS}.num_hidden_layers", 2),
    "another hidden_size": change(f"{LAYERS}.hidden_size", 32),
    "another target_hidden_size": change("target_hidden_size", 32),
    "another vocab_size": change(f"{LAYERS}.vocab_size", VOCAB + 1),
    "full vocabulary": change("draft_vocab_size", VOCAB),
    "no draft_vocab_size": change("draft_vocab_size", None),
    "norm_before_fc": change("norm_before_fc", True),
    "fc_norm": change("fc_norm", True),
    **{
        f"no {key}": change(key, None)
        for key in (
            *("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"),
            *("target_hidden_size", "speculators_model_type", "speculators_config"),
            *("speculators_config.verifier.name_or_path", "speculators_config.proposal_methods"),
            *("speculators_config.verifier.architectures", LAYERS),
        )
    },
    "no tokens": change("speculators_config.proposal_methods.0.speculative_tokens", 0),
    "another model_type": change("model_type", "llama"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_fault_is_found_without_an_engine(served: Path, fault: str) -> None:
    assert find_problems(served, "vllm") == []
    content, tensors = read_folder(served)
    FAULTS[fault](content, tensors)
    write_folder(served, content, tensors)

    assert find_problems(served, "vllm") != []


@pytest.mark.parametrize("damage", ["cut", "second file", "no config", "no weights"])
def test_damaged_folders_are_found(served: Path, damage: str) -> None:
    weights = served / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "second file":
        (served / "optimizer.safetensors").write_bytes(weights.read_bytes())
    elif damage == "no config":
        (served / "config.json").unlink()
    else:
        weights.unlink()

    assert len(find_problems(served, "vllm")) == 1
