"""The model card and the provenance of an export."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from speculators_cli import __version__
from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import PRODUCER, DraftConfig
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.escaping import escape
from speculators_cli.core.export import markdown
from speculators_cli.core.export.targets.target import EngineAdvice, Target
from speculators_cli.core.models.repo_files import WEIGHTS_NAME
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.settings.export import ExportSettings

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
PROVENANCE_NAME = "provenance.json"
FILES = "files"  # in it: checksum of every other file of the export, by name
# Settings listed in the card: section, name, label.
SHOWN = (
    ("run", "epochs", "epochs"),
    ("optimizer", "lr", "peak learning rate"),
)
SHOWN_AFTER = (  # below those of the algorithm
    ("data", "total_seq_len", "tokens per packed sequence"),
    ("data", "noise_std", "noise on aux hidden states"),
)


def build_provenance(source: TrainedDraft, settings: ExportSettings) -> dict[str, Any]:
    """Tool, settings and data of an export, without folders of the training machine."""
    checkpoint = source.checkpoint
    chosen = settings.export
    training = None
    if checkpoint is not None:
        state = checkpoint.state
        keys = ("run_id", "step", "epoch", "global_batch", "data_hash", "vocab_map_hash", "metrics")
        training = {key: getattr(state, key) for key in keys}
        training["settings"] = _without_folders(state.settings)
        training["weights_sha256"] = checkpoint.manifest.files[WEIGHTS_NAME].sha256
    return {
        "tool": {"name": PRODUCER, "version": __version__},
        "source": {"kind": source.kind, "name": Path(source.name).name},
        "export": {
            "target": chosen.target,
            "dtype": chosen.dtype,
            "num_speculative_tokens": chosen.num_speculative_tokens
            or source.config.num_draft_tokens,
            "has_embedding": chosen.embeddings and source.embedding is not None,
            "target_layer_ids": list(source.config.target_layer_ids),
            "are_layer_ids_assumed": source.config.are_layer_ids_assumed,
        },
        "training": training,
    }


def build_card(
    source: TrainedDraft,
    served: DraftConfig,
    settings: ExportSettings,
    target: Target,
    advice: EngineAdvice | None,
    licence: Mapping[str, Any],  # `license` and what goes with it; may be empty
) -> str:
    """README.md of an export, with the metadata that the hub reads."""
    algorithm, verifier = source.algorithm, served.verifier_name_or_path
    is_on_hub = not Path(verifier).exists()
    # The path of a local folder means nothing elsewhere.
    shown = verifier if is_on_hub else Path(verifier).name
    data = ModelCardData(
        **{"license": "unknown", **licence},
        base_model=verifier if is_on_hub and HUB_ID.fullmatch(verifier) else None,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", algorithm.name, "speculators", target.name],
    )
    parts = [
        f"# {algorithm.title or algorithm.name} draft for {markdown.text(shown)}",
        "A draft model for speculative decoding. It proposes tokens that the verifier checks, "
        "which speeds up generation without changing the output.",
        "## Usage",
        target.card_text(served, settings.export.output_dir),
        *([advice.sentence] if advice else []),
        "## Model",
        markdown.table(_facts(source, served, shown, settings)),
    ]
    if source.checkpoint is not None:
        state = source.checkpoint.state
        parts += ["## Training", markdown.table(_training_facts(state, algorithm))]
        if state.metrics.get("acceptance_length"):
            parts += ["## Acceptance length", _acceptance(state.metrics)]
    parts.append(f"Written by {PRODUCER} {__version__}; `provenance.json` has all settings.")
    return f"---\n{escape(data.to_yaml())}\n---\n\n" + "\n\n".join(parts) + "\n"


def _facts(
    source: TrainedDraft, served: DraftConfig, shown: str, settings: ExportSettings
) -> list[tuple[str, str]]:
    ids = ", ".join(map(str, served.target_layer_ids))
    vocabulary = f"{served.draft_vocab_size:,} of {served.vocab_size:,} tokens"
    window = served.sliding_window
    attention = "" if window is None else f", sliding window of {window:,} tokens"
    return [
        ("verifier", markdown.text(shown)),
        ("exported from", f"{source.kind} {markdown.code(Path(source.name).name)}"),
        ("decoder layers", f"{served.num_layers} ({served.arch}{attention})"),
        ("hidden size", f"{served.hidden_size:,}"),
        ("draft vocabulary", vocabulary),
        ("verifier layers", f"{ids} (assumed)" if served.are_layer_ids_assumed else ids),
        ("draft tokens per pass", str(served.num_draft_tokens)),
        ("dtype", settings.export.dtype),
    ]


def _training_facts(state: TrainState, algorithm: Algorithm[Any, Any]) -> list[tuple[str, str]]:
    facts = [("optimizer steps", f"{state.step:,}")]
    own = [(algorithm.name, *item) for item in algorithm.card_settings.items()]
    for section, name, words in (*SHOWN, *own, *SHOWN_AFTER):
        value = state.settings.get(section, {}).get(name)
        if value is not None:
            facts.append((words, markdown.text(value)))
    facts.append(("data hash", markdown.code(state.data_hash)))
    return facts


def _acceptance(metrics: Mapping[str, float]) -> str:
    rates = [
        f"{metrics[key]:.3f}"
        for key in sorted(key for key in metrics if key.startswith("acceptance_rate_"))
    ]
    return (
        f"Simulated acceptance length on validation data, with teacher forcing: "
        f"{metrics['acceptance_length']:.2f} tokens per verifier pass (acceptance rate per "
        f"position: {', '.join(rates)}). The acceptance length in an engine depends on the prompts."
    )


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without its folders."""
    kept = {}
    for section, values in settings.items():
        kept[section] = {
            name: Path(str(value)).name
            if name == "verifier_name_or_path" and str(value)[:1] == "/"
            else value
            for name, value in values.items()
            if name == "verifier_name_or_path" or not name.endswith(("_path", "_dir"))
        }
    return kept
