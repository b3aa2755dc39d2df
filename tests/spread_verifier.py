"""The embedded verifier, with a final norm that matters."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.demo.demo import VERIFIER_DIR


def write_spread_verifier(folder: Path) -> Path:
    """Write the verifier with its final norm's gain spread out, and the head made up for it.

    The embedded one's gains are so even that the norm hardly changes which token comes first.
    """
    config = json.loads((VERIFIER_DIR / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = {k: x.float() for k, x in load_file(VERIFIER_DIR / "model.safetensors").items()}
    spread = torch.randn(128, generator=torch.Generator().manual_seed(0)).exp()
    tensors["model.norm.weight"] *= spread
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] / spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
