"""Samples of a real verifier: the embedded one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from tests.generated_samples import generate_samples


@pytest.fixture(scope="session")
def captured_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of a real verifier, whose head predicts them."""
    folder = tmp_path_factory.mktemp("captured")
    generate_samples(
        folder, read_prompts()[:6], max_new_tokens=24, storage={"all_last_states": True}
    )
    write_data_config(folder, verifier="the-verifier", layer_ids=(2, 4, 5))
    return folder


@pytest.fixture(scope="session")
def verifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same verifier with its final norm's gain spread out, and the head made up for it.

    The embedded one's gains are so even that the norm hardly changes which token comes first.
    """
    folder = tmp_path_factory.mktemp("verifier")
    config = json.loads((VERIFIER_DIR / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = {k: x.float() for k, x in load_file(VERIFIER_DIR / "model.safetensors").items()}
    spread = torch.randn(128, generator=torch.Generator().manual_seed(0)).exp()
    tensors["model.norm.weight"] *= spread
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] / spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
