"""The verifier's frozen parts, against the verifier itself, for each family of models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
from speculators_cli.core.models.verifier_shape import read_verifier_shape
from tests.recorded_progress import RecordedProgress

SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 37, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
MLA = WITHOUT_HEAD_DIM | {
    "num_key_value_heads": 6, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 4, "dim_model_base": 6, "head_dim": 4,
}  # fmt: skip
MROPE = {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 24,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-4),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),  # gain stored as 1 + w, tied
    "gemma2": lambda: transformers.Gemma2Config(**SIZES),  # and its logits are squashed
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),  # divides
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**WITHOUT_HEAD_DIM),  # LayerNorm without a bias
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, logit_scale=0.25),
    "starcoder2": lambda: transformers.Starcoder2Config(**WITHOUT_HEAD_DIM, norm_epsilon=1e-3),
    "nemotron": lambda: transformers.NemotronConfig(**SIZES),  # LayerNorm, gain stored as 1 + w
    "phi": lambda: transformers.PhiConfig(**WITHOUT_HEAD_DIM),  # `final_layernorm`, LM-head bias
    "gpt_neox": lambda: transformers.GPTNeoXConfig(  # `embed_in`, `final_layer_norm`
        **{k: v for k, v in WITHOUT_HEAD_DIM.items() if k != "num_key_value_heads"}
    ),
    "olmo": lambda: transformers.OlmoConfig(**WITHOUT_HEAD_DIM),  # its norm has no weights
    "lfm2": lambda: transformers.Lfm2Config(**WITHOUT_HEAD_DIM, norm_eps=1e-3),  # `embedding_norm`
    "minicpm3": lambda: transformers.MiniCPM3Config(**MLA),  # hidden states divided, then the head
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=40, num_local_experts=2
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config=SIZES | {"rope_parameters": MROPE}, vision_config=SMALL_VISION
    ),
    "gemma3": lambda: transformers.Gemma3Config(  # multimodal: `text_config`, prefixed names
        text_config=transformers.Gemma3TextConfig(**SIZES).to_dict(),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    ),
}  # fmt: skip


LAYER_NORMS = ("cohere", "cohere2", "starcoder2", "nemotron", "phi", "gpt_neox", "olmo")


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
            torch.nn.init.normal_(parameter, std=0.5)
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
    norms = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm")
    decoder = (
        getattr(model.model, "language_model", model.model)
        if hasattr(model, "model")
        else model.gpt_neox
    )
    norm = next(getattr(decoder, name) for name in norms if hasattr(decoder, name))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 14)[None]).logits[0]

    config, verifier = load(tmp_path)
    pre_norm = seen[0][0]
    normed = verifier.normed(pre_norm, torch.zeros(len(pre_norm)).bool())
    logits = verifier.logits(normed, verifier.head)

    assert verifier.vocab_size == 37
    assert config.hidden_size == 24
    # Both round in float32, at most a few times a value.
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(verifier.tokens(normed, rows_at_once=4), expected.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_verifiers_stored_in_bfloat16_are_read(family: str, tmp_path: Path) -> None:
    # The norm of its class is tried out in float32, whatever the config's dtype.
    save_verifier(FAMILIES[family](), tmp_path, dtype=torch.bfloat16)

    config, verifier = load(tmp_path)

    assert config.norm_offset == (1.0 if family.startswith(("gemma", "nemotron")) else 0.0)
    assert config.is_norm_centred == (family in LAYER_NORMS)
    assert verifier.head.dtype is torch.bfloat16


def test_states_that_are_normed_already_are_not_normed_again(tmp_path: Path) -> None:
    # Trap: v0 states normed twice, or v1 states not at all.
    save_verifier(FAMILIES["llama"](), tmp_path)
    _, verifier = load(tmp_path)
    states = torch.randn(4, 24)

    out = verifier.normed(states, torch.tensor([True, False, True, False]))

    assert torch.equal(out[0::2], states[0::2])
    rms = states[1::2].pow(2).mean(-1, keepdim=True).add(1e-4).rsqrt()
    torch.testing.assert_close(out[1::2], states[1::2] * rms * verifier.norm_weight)


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


def test_a_verifier_without_a_head_is_refused(tmp_path: Path) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(SettingsError, match=r"no tensor `lm_head\.weight`"):
        load(tmp_path)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (
        lambda: transformers.BertConfig(**WITHOUT_HEAD_DIM, is_decoder=True),
        "more than one norm and one LM head",
    ),
    "openai-gpt": (
        lambda: transformers.OpenAIGPTConfig(n_embd=24, n_layer=2, n_head=6, vocab_size=37),
        "no final norm",
    ),
    # Its last norm before the LM head, without layers, is that of the embeddings.
    "bart": (
        lambda: transformers.BartConfig(
            d_model=24, decoder_layers=2, encoder_layers=2, decoder_attention_heads=6,
            decoder_ffn_dim=40, vocab_size=37,
        ),
        "no final norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_with_other_logits_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    make, reason = REFUSED[family]
    make().save_pretrained(tmp_path)

    with pytest.raises(SettingsError, match=f"`{family}`\\) has {reason}"):
        read_verifier_config(VerifierFiles(str(tmp_path)), trust_remote_code=False)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        # Packages, kernels and dtypes that three tensors do not need.
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"attn_implementation": "flash_attention_2", "dtype": "float8_e4m3fn"},
        # Its class refuses these values, which reach neither norm nor logits.
        {"num_key_value_heads": [2, 2], "intermediate_size": [40, 48]},
        {"layer_types": ["of a later version", "full_attention"], "rope_theta": 10000.0},
        {"num_hidden_layers": 9999},
        {"an_unknown_key": {"of": ["any", "kind"]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_values_that_the_logits_do_not_depend_on_refuse_no_verifier(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = save_verifier(FAMILIES["llama"](), tmp_path)
    change_config(tmp_path, **changes)

    config, verifier = load(tmp_path)

    assert (config.hidden_size, config.num_heads, config.num_kv_heads) == (24, 6, 2)
    assert (config.intermediate_size, config.head_dim) == (40, 8)
    assert config.rms_norm_eps == 1e-4
    assert torch.equal(verifier.head, model.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "`hidden_size` 1,000,000,000, expected 0 to"),
        ({"num_hidden_layers": 2**40}, "`num_hidden_layers` 1,099,511,627,776, expected 0 to"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        (
            {"model_type": "of_a_later_version"},
            "is of a type that transformers .* does not support",
        ),
        ({"hidden_size": None}, "no usable `hidden_size`"),
    ],
    ids=str,
)
def test_a_config_that_decides_the_logits_wrongly_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    change_config(tmp_path, **changes)

    with pytest.raises(SettingsError, match=message):
        load(tmp_path)


def test_a_verifier_of_a_type_that_transformers_lacks_still_has_sizes(tmp_path: Path) -> None:
    save_verifier(FAMILIES["qwen3_vl"](), tmp_path)
    change_config(tmp_path, model_type="of_a_later_version")

    shape = read_verifier_shape(VerifierFiles(str(tmp_path)), trust_remote_code=False)

    assert (shape.hidden_size, shape.num_layers, shape.num_kv_heads) == (24, 2, 2)


def test_the_bias_of_an_lm_head_is_added_to_the_rows_of_a_draft_vocabulary(tmp_path: Path) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = torch.arange(37.0)
    save_file(tensors | {"lm_head.bias": bias}, tmp_path / "model.safetensors")

    _, verifier = load(tmp_path)
    states = torch.randn(3, 24)
    kept = torch.tensor([1, 4, 36])
    some = verifier.logits(states, verifier.head[kept], verifier.bias_of(kept))

    expected = states @ tensors["lm_head.weight"].T + bias
    torch.testing.assert_close(verifier.logits(states, verifier.head), expected)
    torch.testing.assert_close(some, expected[:, kept])


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_head_is_the_embedding_whatever_lm_head_the_files_hold(
    tmp_path: Path, *, is_same: bool
) -> None:
    save_verifier(FAMILIES["llama_tied"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if is_same else embedding + 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    progress = RecordedProgress()

    files = VerifierFiles(str(tmp_path))
    config = read_verifier_config(files, trust_remote_code=False)
    verifier = load_frozen_verifier(files, config, progress=progress)

    assert config.is_tied
    assert torch.equal(verifier.head, embedding)
    assert ["differs from its embedding" in x for x in progress.warnings] == (
        [] if is_same else [True]
    )
    assert None not in progress.hints


def test_an_untied_wrapper_keeps_its_own_head_though_its_class_ties_by_default(
    tmp_path: Path,
) -> None:
    model = save_verifier(FAMILIES["gemma3"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(37, 24)}, tmp_path / "model.safetensors")
    change_config(tmp_path, tie_word_embeddings=False)
    content = json.loads((tmp_path / "config.json").read_text("utf-8"))
    content["text_config"].pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")

    config, verifier = load(tmp_path)

    assert model.config.tie_word_embeddings
    assert not config.is_tied
    assert torch.equal(verifier.head, torch.ones(37, 24))


def test_the_embedding_of_another_tower_is_not_the_text_models(tmp_path: Path) -> None:
    save_verifier(FAMILIES["qwen3_vl"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    text = tensors.pop("model.language_model.embed_tokens.weight")
    tensors["thinker.model.embed_tokens.weight"] = text
    tensors["thinker.model.norm.weight"] = tensors.pop("model.language_model.norm.weight")
    tensors["thinker.lm_head.weight"] = tensors.pop("lm_head.weight")
    for other in ("talker.model", "thinker.audio_tower", "a.visual"):
        tensors[f"{other}.embed_tokens.weight"] = torch.zeros(5, 24)
        tensors[f"{other}.norm.weight"] = torch.zeros(24)
    save_file(tensors, tmp_path / "model.safetensors")

    _, verifier = load(tmp_path)

    assert torch.equal(verifier.embedding, text)
    assert torch.equal(verifier.norm_weight, tensors["thinker.model.norm.weight"])


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


def test_a_head_that_the_familys_own_code_does_not_tie_is_read_whatever_the_config_sets(
    tmp_path: Path,
) -> None:
    config = transformers.BigBirdPegasusConfig(
        d_model=24, decoder_layers=2, encoder_layers=2, decoder_attention_heads=6,
        decoder_ffn_dim=40, vocab_size=37, max_position_embeddings=64,
    )  # fmt: skip
    model: Any = transformers.BigBirdPegasusForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["tie_word_embeddings"]

    found, verifier = load(tmp_path)

    assert not found.is_tied
    assert torch.equal(verifier.head, model.lm_head.weight)


@pytest.mark.parametrize(
    "names", [("embed", "head"), ("tok_embeddings", "output"), ("llm.embed", "llm.unembed")]
)
def test_files_under_a_familys_original_names_are_read(
    names: tuple[str, str], tmp_path: Path
) -> None:
    save_verifier(FAMILIES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = names[0].rpartition(".")[0]
    renamed = {
        f"{names[0]}.weight": tensors["model.embed_tokens.weight"],
        f"{prefix}.norm.weight".removeprefix("."): tensors["model.norm.weight"],
        f"{names[1]}.weight": tensors["lm_head.weight"],
    }
    save_file(renamed, tmp_path / "model.safetensors")

    _, verifier = load(tmp_path)

    assert torch.equal(verifier.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(verifier.norm_weight, tensors["model.norm.weight"])
    assert torch.equal(verifier.head, tensors["lm_head.weight"])


@pytest.mark.parametrize("rope", [MROPE, {"rope_type": "default", "rope_theta": 1e6}])
def test_a_head_size_that_the_rope_does_not_fit_hinders_no_measurement(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    # Without `mrope_section` this family takes one for heads of 128; its vision tower has axial
    # RoPE only.
    model = save_verifier(
        transformers.Qwen2VLConfig(
            text_config=SIZES | {"rope_parameters": rope}, vision_config={"depth": 1}
        ),
        tmp_path,
    )

    _, verifier = load(tmp_path)

    states = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model.model.language_model.norm(states))
    normed = verifier.normed(states, torch.zeros(5).bool())
    logits = verifier.logits(normed, verifier.head)
    # Both round in float32, at most a few times a value.
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_resting_head_is_with_the_embedding_only_while_it_is_needed() -> None:
    head = torch.randn(7, 4)
    config = Mock(spec=VerifierConfig)
    untied = FrozenVerifier(torch.zeros(7, 4, device="meta"), torch.ones(4), head, config)
    tied = torch.zeros(7, 4, device="meta")
    same = FrozenVerifier(tied, torch.ones(4), tied, config)

    for verifier in (untied, same):
        verifier.rest_head()

    with untied.whole():
        assert untied.head.device.type == "meta"
    assert untied.head is head
    assert same.head is same.embedding


def test_a_resting_head_is_not_read_back_from_the_device() -> None:
    config = Mock(spec=VerifierConfig)
    read = FrozenVerifier(torch.zeros(7, 4), torch.ones(4), torch.randn(7, 4), config)

    verifier = read.to(torch.device("meta"))
    verifier.rest_head(read.head)

    # The device has no values to read.
    assert torch.equal(verifier.head, read.head)
    assert verifier.head.data_ptr() != read.head.data_ptr()  # whose file may be mapped
