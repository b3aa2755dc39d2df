"""Families that are read without transformers: as its code would be measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.models import verifier, verifier_shape
from speculators_cli.core.models.plain_family import PLAIN, find_plain
from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import open_family

CONTENT: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 37, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4, "rope_theta": 5e5, "tie_word_embeddings": False, "eos_token_id": [2, 3],
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "another eps": {"rms_norm_eps": 1e-5},
    "stretched": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "stretched, as older configs say it": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "no scaling": {"rope_scaling": None},
    "newer": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 7e4, **LLAMA3},
    },
    "quantized": {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"},
    "window": {"sliding_window": 16, "use_sliding_window": False},
}


def content_of(kind: str, **changes: Any) -> dict[str, Any]:
    content = CONTENT | changes | {"model_type": kind, "architectures": [PLAIN[kind]]}
    return {key: value for key, value in content.items() if key != "rope_theta" or value}


def read(folder: Path, content: dict[str, Any]) -> tuple[VerifierConfig, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    files = VerifierFiles(str(folder))
    config = read_verifier_config(files, trust_remote_code=False)
    return config, open_family(files, trust_remote_code=False).value("eos_token_id")


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_plain_config_is_read_as_it_is_measured(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(kind, **changes)
    assert find_plain("", content) is not None

    found = read(tmp_path / "verifier", content)

    monkeypatch.setattr(verifier_shape, "find_plain", lambda *_: None)
    monkeypatch.delattr(verifier, "plain_readout")
    assert found == read(tmp_path / "verifier", content)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"auto_map": {"AutoConfig": "code.Config"}},
        {"model_type": "gemma"},
        {"hidden_size": None},
        {"num_attention_heads": 5},
        {"rms_norm_eps": "1e-5"},
        {"tie_word_embeddings": None},
        {"partial_rotary_factor": 0.5},
        {"rope_theta": None},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "attention_factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"text_config": {"hidden_size": 48}},
    ],
    ids=str,
)
def test_what_a_config_does_not_say_plainly_is_measured(changes: dict[str, Any]) -> None:
    assert find_plain("", content_of("llama")) is not None

    assert find_plain("", content_of("llama") | changes) is None


def test_the_head_size_of_qwen3_is_not_guessed() -> None:
    content = content_of("qwen3")
    del content["head_dim"]

    assert find_plain("", content) is None
