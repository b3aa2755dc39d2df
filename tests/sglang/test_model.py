"""Exports in SGLang's own model class, on CPU: the same weights, the same logits.

docs/contributing.md says how to install the engine; `SGLANG_PYTHON` names its interpreter.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.algorithm import Eagle3
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import TrainedDraft, read_draft
from speculators_cli.core.models.attention import CausalMemory
from tests.vllm.exported_drafts import RESIDUAL_OFF, Variant, export, train

pytestmark = pytest.mark.sglang

COMPUTE_FILE = Path(__file__).parent / "compute.py"
NUM_TOKENS = 32
# Float32 keeps 24 bits; a dozen sums in a row, each of some hundred terms, may be in another order.
TOLERANCE = 2**-16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


def make_inputs(source: TrainedDraft) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = source.config
    width = config.num_aux_layers * config.target_hidden_size
    return {
        "tokens": torch.randint(config.vocab_size, (NUM_TOKENS,), generator=generator),
        "positions": torch.arange(NUM_TOKENS),
        "hidden_states": torch.randn(NUM_TOKENS, width, generator=generator),
    }


@torch.inference_mode()
def compute(source: TrainedDraft, inputs: dict[str, Tensor]) -> Tensor:
    """[2 * seq_len, draft_vocab]: logits of two steps, by this package."""
    assert source.embedding is not None
    assert isinstance(source.config, Eagle3Config)
    draft = Eagle3().load_draft(source.config, source.weights, source.embedding)
    hidden = draft.fuse(inputs["hidden_states"])
    logits = []
    for step in range(2):
        memories = [CausalMemory() for _ in draft.layers]
        tokens, positions = inputs["tokens"].roll(-step), inputs["positions"] + step
        normed, hidden = draft.step(tokens, hidden, positions, memories)
        logits.append(draft.lm_head(normed))
    return torch.cat(logits)


@pytest.mark.parametrize(
    "variant",
    [
        RESIDUAL_OFF,
        Variant((*RESIDUAL_OFF.train, "--full-vocab")),
        Variant(RESIDUAL_OFF.train, rope_theta=1000.0),
    ],
    ids=["default", "full vocabulary", "RoPE theta 1,000"],
)
def test_the_engine_computes_the_same_draft(folder: Path, variant: Variant) -> None:
    save_path = train(variant, folder)
    out = export(save_path, folder / f"{save_path.name}-served", "--target", "sglang")
    given = Overrides(verifier_name_or_path="verifier", verifier_architectures=("any",))
    source = read_draft(str(out), given, flag="CHECKPOINT")
    inputs = make_inputs(source)
    files = [folder / f"{save_path.name}-{name}.safetensors" for name in ("inputs", "result")]
    save_file(inputs, files[0])

    done = subprocess.run(
        [os.environ["SGLANG_PYTHON"], COMPUTE_FILE, out, *files],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    result = load_file(files[1])
    parameters = {name: x for name, x in result.items() if name.startswith("parameter ")}
    assert len(parameters) == 11
    assert all(x.isfinite().all() for x in parameters.values())  # each was loaded
    if source.vocab_map.is_full:
        assert "kept_ids" not in result
    else:
        assert torch.equal(result["kept_ids"], source.vocab_map.kept_ids)
    found = torch.cat([result["logits 0"], result["logits 1"]])
    expected = compute(source, inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)
    for misread in ({"norm_before_residual": True}, {"rope_parameters": OTHER_ROPE}):
        other = compute(replace(source, config=replace(source.config, **misread)), inputs)
        assert float((found - other).abs().max()) > 100 * TOLERANCE * scale


OTHER_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
