"""Drafts of the embedded verifier that know its answers to a few prompts by heart."""

from pathlib import Path
from typing import Any

from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from speculators_cli.settings.train import TrainSettings
from tests.embedded_verifier_map import write_vocab_map

# Short sequences: as many steps from fewer tokens.
SEQ_LEN = 128


def train_draft(folder: Path, *, epochs: int, **sections: dict[str, Any]) -> Path:
    """Train on the samples in `folder/data`, with a reduced vocabulary; returns the checkpoint.

    Args:
        folder: With the samples; the run is written there, too.
        epochs: Of all samples; none are kept for validation.
        sections: Settings that are changed.
    """
    write_vocab_map(folder)
    content: dict[str, dict[str, Any]] = {
        "draft": {
            "verifier_name_or_path": str(VERIFIER_DIR),
            "d2t_path": folder / "d2t.npy",
            "t2d_path": folder / "t2d.npy",
        },
        "data": {
            "data_path": (folder / "data",),
            "total_seq_len": SEQ_LEN,
            "train_data_ratio": 1.0,
        },
        "run": {"save_path": folder / "checkpoints", "epochs": epochs},
        "checkpoints": {"keep_checkpoints": 1},
        "optimizer": {"lr": 3e-3},
        "distributed": {"device": "cpu"},
    }
    for section, fields in sections.items():
        content[section] = content.get(section, {}) | fields
    report = train(TrainSettings.model_validate(content), progress=SilentProgress())
    assert report.checkpoint is not None
    return report.checkpoint
