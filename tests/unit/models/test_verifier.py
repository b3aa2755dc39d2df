"""The verifier's frozen parts, against the verifier itself, for each family of models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.models.verifier import (
    FrozenVerifier,
    VerifierConfig,
    load_frozen_verifier,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles

SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 37, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-4),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),  # gain stored as 1 + w, tied
    "gemma2": lambda: transformers.Gemma2Config(**SIZES),  # and its logits are squashed
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "gemma3": lambda: transformers.Gemma3Config(  # multimodal: `text_config`, prefixed names
        text_config=transformers.Gemma3TextConfig(**SIZES).to_dict(),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    ),
}  # fmt: skip


def save_verifier(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random verifier of this config, saved in `folder`; norm gains are not trivial."""
    torch.manual_seed(0)
    is_multimodal = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if is_multimodal else None
    auto_class: Any = auto or transformers.AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        elif "embed" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> tuple[VerifierConfig, FrozenVerifier]:
    files = VerifierFiles(str(folder))
    config = read_verifier_config(files, trust_remote_code=False)
    return config, load_frozen_verifier(files, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_equal_the_verifiers_own_logits(family: str, tmp_path: Path) -> None:
    # Traps: tied embeddings, text_config, prefixed names, 1 + w gains, squashed or scaled logits.
    model = save_verifier(FAMILIES[family](), tmp_path)
    seen: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 14)[None]).logits[0]

    config, verifier = load(tmp_path)
    pre_norm = seen[0][0]
    normed = verifier.normed(pre_norm, torch.zeros(len(pre_norm)).bool())
    logits = verifier.logits(normed, verifier.head)

    assert verifier.vocab_size == 37
    assert config.hidden_size == 24
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(verifier.tokens(normed, rows_at_once=4), expected.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_verifiers_stored_in_bfloat16_are_read(family: str, tmp_path: Path) -> None:
    # The norm of its class is tried out in float32, whatever the config's dtype.
    save_verifier(FAMILIES[family](), tmp_path, dtype=torch.bfloat16)

    config, verifier = load(tmp_path)

    assert config.norm_offset == (1.0 if family.startswith("gemma") else 0.0)
    assert verifier.head.dtype is torch.bfloat16


def test_states_that_are_normed_already_are_not_normed_again(tmp_path: Path) -> None:
    # Trap: v0 states normed twice, or v1 states not at all.
    save_verifier(FAMILIES["llama"](), tmp_path)
    _, verifier = load(tmp_path)
    states = torch.randn(4, 24)

    out = verifier.normed(states, torch.tensor([True, False, True, False]))

    assert torch.equal(out[0::2], states[0::2])
    rms = states[1::2].pow(2).mean(-1, keepdim=True).add(1e-4).rsqrt()
    torch.testing.assert_close(out[1::2], states[1::2] * rms * verifier.norm_gain)


def test_rope_and_head_size_come_from_the_verifier(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77777.0}
    save_verifier(transformers.LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)

    config, _ = load(tmp_path)

    assert dict(config.rope_parameters) == rope
    assert config.head_dim == 8
    assert (config.num_heads, config.num_kv_heads) == (6, 2)


def test_only_the_needed_tensors_of_a_sharded_verifier_are_read(tmp_path: Path) -> None:
    model = save_verifier(FAMILIES["llama"](), tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    needed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    folder = tmp_path / "sharded"
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file({name: tensors[name] for name in needed}, folder / "b.safetensors")
    # The other shard does not exist: reading it would fail.
    weight_map = {name: "b" if name in needed else "a" for name in tensors}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    _, verifier = load(folder)

    assert torch.equal(verifier.head, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lm_head.weight": None, "lm_head.qweight": torch.zeros(3, dtype=torch.int32)}, "qweight"),
        ({"lm_head.weight": torch.zeros(37, 24, dtype=torch.int8)}, "int8"),
        ({"lm_head.weight": torch.zeros(37, 24).to(torch.float8_e4m3fn)}, "float8"),
    ],
)
def test_a_quantised_head_is_refused(
    changes: dict[str, torch.Tensor | None], named: str, tmp_path: Path
) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")

    with pytest.raises(SettingsError, match=f"quantised.*{named}") as error:
        load(tmp_path)

    assert error.value.hint is not None


def test_a_verifier_without_a_head_is_refused(tmp_path: Path) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(SettingsError, match=r"no tensor `lm_head\.weight`"):
        load(tmp_path)


def test_a_verifier_whose_norm_is_no_rmsnorm_is_refused(tmp_path: Path) -> None:
    cohere = transformers.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    save_verifier(cohere, tmp_path)

    with pytest.raises(SettingsError, match="not an RMSNorm"):
        load(tmp_path)


def test_a_damaged_weights_file_is_named(tmp_path: Path) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")

    with pytest.raises(SettingsError, match=r"model\.safetensors` is a web page"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "does not exist"),
        ("two words", "neither a folder nor a hub id"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_verifier_config(VerifierFiles(name), trust_remote_code=False)


def test_a_hub_id_without_a_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(MachineError, match="the hub cannot be reached") as error:
        read_verifier_config(VerifierFiles("example/verifier"), trust_remote_code=False)

    assert error.value.exit_code == 5


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no `config\.json`"):
        read_verifier_config(VerifierFiles(str(tmp_path)), trust_remote_code=False)
