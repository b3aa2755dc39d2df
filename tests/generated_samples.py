"""Samples of the embedded verifier, by the job that users run."""

import json
from collections.abc import Sequence
from pathlib import Path

from speculators_cli.core.capture.generate import generate_data
from speculators_cli.core.capture.report import GenerationReport
from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.generate_data import GenerateDataSettings


def generate_samples(
    folder: Path,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    layer_ids: tuple[int, ...] = (2, 4, 5),
    verifier: Path = VERIFIER_DIR,
    **sections: dict[str, object],
) -> GenerationReport:
    """Write the verifier's greedy answers to prompts, with hidden states, into a folder."""
    prompts = folder.with_name(f"{folder.name}-prompts.jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    content: dict[str, dict[str, object]] = {
        "input": {"prompts": str(prompts), "output_dir": folder},
        "verifier": {"verifier_name_or_path": str(verifier), "target_layer_ids": layer_ids},
        "tokens": {"regenerate": True, "max_new_tokens": max_new_tokens},
        "engine": {"device": "cpu"},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    report = generate_data(GenerateDataSettings.model_validate(content), progress=SilentProgress())
    assert report is not None, "one process is the first rank"
    return report


def sample_files(folder: Path) -> list[Path]:
    """The samples in a generated folder, in order."""
    return sorted((folder / "samples").rglob("*.pt"))
