"""The contract of a DFlash export: what engines silently misread is found without one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import ExportError
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.export import ExportReport, export
from speculators_cli.core.progress import Progress, SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.settings.export import ExportSettings
from tests.recorded_progress import RecordedProgress
from tests.tiny_drafts import read_folder, write_folder
from tests.tiny_run import DRAFT_VOCAB, LAYER_IDS, VOCAB, TinyInputs
from tests.unit.export.test_contract import change, put

QUIET = SilentProgress()
LAYERS = "transformer_layer_config"


def run(inputs: TinyInputs, folder: Path, **draft: object) -> Path:
    settings = inputs.settings(
        draft={"algorithm": "dflash", "num_layers": 2, **draft},
        dflash={"block_size": 5, "mask_token_id": 1, "draft_window": 6},
        run={"save_path": folder / "checkpoints", "epochs": 1},
    )
    train(settings, progress=QUIET)
    return folder / "checkpoints"


def write(
    checkpoint: Path, out: Path, progress: Progress = QUIET, **changes: object
) -> ExportReport:
    content = {
        "source": {"checkpoint": str(checkpoint)},
        "export": {"output_dir": out, "dtype": "float32", **changes},
    }
    return export(ExportSettings.model_validate(content), progress=progress)


@pytest.fixture(scope="module")
def checkpoint(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(shared_inputs, tmp_path_factory.mktemp("reduced"))


@pytest.fixture(scope="module")
def full(shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the verifier's vocabulary."""
    return run(shared_inputs, tmp_path_factory.mktemp("full"), full_vocab=True)


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    """An export in float32; nothing may be written into it."""
    write(checkpoint, checkpoint.parent / "served")
    return checkpoint.parent / "served"


@pytest.fixture
def served(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, tmp_path / "served")


NAMES = (
    *("fc.weight", "hidden_norm.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
    *(
        f"layers.1.{name}.weight"
        for name in (
            *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"),
            *("self_attn.k_norm", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"),
        )
    ),
)
FAULTS: dict[str, Any] = {
    **{f"no {name}": put(name, lambda _: None) for name in NAMES},
    "extra tensor": put("foo.weight", lambda x: x["fc.weight"].clone()),
    "mask_hidden": put("mask_hidden", lambda x: x["fc.weight"][:1].clone()),
    "fc of two layers": put("fc.weight", lambda x: x["fc.weight"][:, :48]),
    "absolute d2t": put("d2t", lambda x: x["d2t"] + torch.arange(DRAFT_VOCAB)),
    "anchor-sampled": change("sample_from_anchor", True),
    "mask outside the vocabulary": change("mask_token_id", VOCAB),
    "mask of text": change("mask_token_id", "1"),
    "another number of tokens": change(
        "speculators_config.proposal_methods.0.speculative_tokens", 3
    ),
    "another block": change("block_size", 6),
    "causality of text": change("sliding_window_non_causal", "true"),
    "causality said twice": change(f"{LAYERS}.is_causal", False),
    "mixed attention": change(f"{LAYERS}.layer_types", ["full_attention", "sliding_attention"]),
    "one layer type": change(f"{LAYERS}.layer_types", ["sliding_attention"]),
    "window without a size": change(f"{LAYERS}.sliding_window", None),
    "llama layers": change(f"{LAYERS}.model_type", "llama"),
    "descending layer ids": change("aux_hidden_state_layer_ids", [7, 5, 3]),
    "full vocabulary": change("draft_vocab_size", VOCAB),
    "three layers": change(f"{LAYERS}.num_hidden_layers", 3),
    **{
        f"no {key}": change(key, None)
        for key in (
            *("mask_token_id", "aux_hidden_state_layer_ids", "sample_from_anchor"),
            *("sliding_window_non_causal", "block_size", "draft_vocab_size"),
            *(f"{LAYERS}.layer_types", f"{LAYERS}.rope_parameters", f"{LAYERS}.head_dim"),
            "speculators_config.proposal_methods",
        )
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_fault_is_found_without_an_engine(served: Path, fault: str) -> None:
    assert find_problems(served, "vllm") == []
    content, tensors = read_folder(served)
    FAULTS[fault](content, tensors)
    write_folder(served, content, tensors)

    assert find_problems(served, "vllm") != []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window_non_causal", False),
        ("mask_token_id", 2),
        ("aux_hidden_state_layer_ids", [2, 4, 6]),
        (f"{LAYERS}.sliding_window", 5),
        (f"{LAYERS}.layer_types", ["full_attention"] * 2),
    ],
)
def test_another_valid_value_is_read_as_another_draft(
    served: Path, key: str, value: object
) -> None:
    # `export` compares what it reads back with what was trained.
    before = read_draft(str(served)).config
    content, tensors = read_folder(served)
    change(key, value)(content, tensors)
    write_folder(served, content, tensors)

    assert find_problems(served, "vllm") == []
    assert read_draft(str(served)).config != before


def test_an_export_reads_back_as_the_checkpoint(checkpoint: Path, exported: Path) -> None:
    source, read = read_draft(str(checkpoint)), read_draft(str(exported))

    assert read.config == source.config
    assert isinstance(read.config, DFlashConfig)
    assert read.config.draft_window == 6
    assert all(torch.equal(read.weights[name], x) for name, x in source.weights.items())
    card = (exported / "README.md").read_text("utf-8")
    assert "# DFlash draft for" in card
    assert '"method": "dflash"' in card
    assert '"num_speculative_tokens": 4' in card
    assert "| tokens per block | 5 |" in card


def test_fewer_tokens_make_a_smaller_block(checkpoint: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    write(checkpoint, tmp_path / "out", progress, num_speculative_tokens=2)

    assert any("was trained to propose 4 tokens, not 2" in text for text in progress.warnings)
    content, _ = read_folder(tmp_path / "out")
    assert content["block_size"] == 3
    assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2


def test_the_full_vocabulary_leaves_the_head_to_the_verifier(full: Path, tmp_path: Path) -> None:
    write(full, tmp_path / "out", embeddings=False)

    _, tensors = read_folder(tmp_path / "out")
    assert tensors.keys().isdisjoint({"lm_head.weight", "d2t", "t2d", "embed_tokens.weight"})


def test_sglang_counts_layers_and_reads_the_full_vocabulary_only(
    checkpoint: Path, full: Path, tmp_path: Path
) -> None:
    write(full, tmp_path / "out", target="sglang")

    content, tensors = read_folder(tmp_path / "out")
    assert content["architectures"] == ["DFlashDraftModel"]
    assert content["dflash_config"] == {
        "target_layer_ids": [k - 1 for k in LAYER_IDS],
        "mask_token_id": 1,
    }
    assert (content["block_size"], content["sliding_window"], content["is_causal"]) == (5, 6, False)
    given = Overrides(verifier_name_or_path="v", verifier_architectures=("LlamaForCausalLM",))
    read, source = read_draft(str(tmp_path / "out"), given).config, read_draft(str(full)).config
    assert read.target_layer_ids == source.target_layer_ids
    for name in ("mask_token_id", "draft_window", "causal_block", "block_size"):
        assert getattr(read, name) == getattr(source, name)
    del tensors["hidden_norm.weight"]
    write_folder(tmp_path / "out", content, tensors)
    assert find_problems(tmp_path / "out", "sglang") == ["`hidden_norm.weight` is missing"]
    with pytest.raises(ExportError, match="reads no `d2t`: train it with `--full-vocab`"):
        write(checkpoint, tmp_path / "refused", target="sglang")


def test_the_eagle_format_has_no_blocks(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="`dflash` cannot be exported for EAGLE"):
        write(full, tmp_path / "out", target="eagle")
