"""A tiny verifier, samples captured from it, and a vocabulary map: everything a run needs.

Dimensions all differ: hidden 24, 3 aux layers, vocab 37, draft vocab 19.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from speculators_cli.settings.train import TrainSettings

HIDDEN, VOCAB, DRAFT_VOCAB, NUM_LAYERS = 24, 37, 19, 9
LAYER_IDS = (3, 5, 7)


@dataclass(frozen=True)
class TinyInputs:
    """Folders and files of a tiny run."""

    folder: Path

    @property
    def verifier_dir(self) -> Path:
        return self.folder / "verifier"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def save_path(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log_dir(self) -> Path:
        return self.folder / "logs"

    def flags(self, **changes: object) -> list[str]:
        """The command line of a short run; a value of None leaves the flag out."""
        values: dict[str, object] = {
            "verifier_name_or_path": self.verifier_dir,
            "data_path": self.data_dir,
            "save_path": self.save_path,
            "log_dir": self.log_dir,
            "d2t_path": self.folder / "d2t.npy",
            "t2d_path": self.folder / "t2d.npy",
            "total_seq_len": 64,
            "epochs": 2,
            "lr": 3e-3,
            "device": "cpu",
            "log_every_steps": 1,
        }
        flags: list[str] = []
        for name, value in (values | changes).items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is not None:
                flags += [flag, str(value)]
        return flags

    def settings(
        self, settings_class: type[TrainSettings] = TrainSettings, /, **changes: Any
    ) -> TrainSettings:
        """The settings of a short run; `changes` are `section={field: value}`."""
        sections: dict[str, dict[str, Any]] = {
            "draft": {
                "verifier_name_or_path": str(self.verifier_dir),
                "d2t_path": self.folder / "d2t.npy",
                "t2d_path": self.folder / "t2d.npy",
            },
            "data": {"data_path": (self.data_dir,), "total_seq_len": 64},
            "run": {
                "save_path": self.save_path,
                "log_dir": self.log_dir,
                "epochs": 2,
                "log_every_steps": 1,
            },
            "optimizer": {"lr": 3e-3},
            "distributed": {"device": "cpu"},
        }
        for section, fields in changes.items():
            sections[section] = sections.get(section, {}) | fields
        return settings_class.model_validate(sections)


def write_inputs(folder: Path, *, num_samples: int = 24, seed: int = 0) -> TinyInputs:
    """Write verifier, v1 samples and maps of a tiny run into `folder`."""
    inputs = TinyInputs(folder)
    model = write_verifier(inputs.verifier_dir)
    generator = torch.Generator().manual_seed(seed)
    inputs.data_dir.mkdir(parents=True)
    for index in range(num_samples):
        length = int(torch.randint(8, 40, (), generator=generator))
        sample = capture_sample(model, torch.randint(3, VOCAB, (length,), generator=generator))
        torch.save(sample, inputs.data_dir / f"data_{index}.pt")
    write_vocab_map(folder)
    return inputs


def write_verifier(folder: Path) -> Any:
    """Save a tiny random Llama in `folder`; returns the model."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        architectures=["LlamaForCausalLM"],
    )
    # Weights must not touch the random state of the test that asks for them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
            else:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def capture_sample(model: Any, input_ids: Tensor) -> dict[str, Tensor | list[Tensor]]:
    """A v1 sample of these tokens: aux states, and last states before the final norm."""
    before_norm: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    states = model(input_ids[None], output_hidden_states=True).hidden_states
    hook.remove()
    return {
        "input_ids": input_ids,
        "loss_mask": (torch.arange(len(input_ids)) >= 3).long(),
        "hidden_states": [*(states[k][0].clone() for k in LAYER_IDS), before_norm[0][0].clone()],
    }


def write_vocab_map(folder: Path) -> None:
    """Write `d2t.npy` and `t2d.npy`: the draft keeps every other verifier token."""
    kept = np.arange(0, VOCAB, 2)
    t2d = np.zeros(VOCAB, dtype=bool)
    t2d[kept] = True
    np.save(folder / "d2t.npy", kept - np.arange(len(kept)))
    np.save(folder / "t2d.npy", t2d)


def write_as_specforge(data_dir: Path, folder: Path) -> Path:
    """The v1 samples of a folder as SpecForge's, their last states taken for normed ones."""
    folder.mkdir()
    for file in data_dir.glob("*.pt"):
        sample = torch.load(file, weights_only=True)
        *aux, last = sample.pop("hidden_states")
        joined = torch.cat(aux, dim=-1)
        content = sample | {"aux_hidden_state": joined[None], "hidden_state": last[None]}
        torch.save(content, folder / f"{file.stem}.ckpt")
    return folder


def split_samples(data_dir: Path, folder: Path, *, num_samples: int) -> Path:
    """Move the first samples of a folder into one of their own."""
    folder.mkdir()
    for file in sorted(data_dir.glob("*.pt"))[:num_samples]:
        file.rename(folder / file.name)
    return folder
