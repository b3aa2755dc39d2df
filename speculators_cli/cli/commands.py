"""The commands, in the order that help lists them; each is imported only when it is needed."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

PROGRAM = "speculators"
SUMMARY = "Train draft models for speculative decoding"


@dataclass(frozen=True)
class Command:
    """One command; the module and the function of its name run it."""

    name: str
    panel: str
    summary: str

    def load(self) -> Any:
        """The function that runs it, with its `flags`, `settings_class` and `examples`."""
        name = self.name.replace("-", "_")
        return getattr(import_module(f"speculators_cli.cli.{name}"), name)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "generate-data", "Data", "Generate samples from prompts or conversations, by a verifier"
        ),
        Command("inspect-data", "Data", "Check a folder of samples and describe it"),
        Command("convert-v0", "Data", "Rewrite v0 samples in the v1 format"),
        Command("build-vocab-map", "Data", "Choose the draft vocabulary and write d2t and t2d"),
        Command("train", "Draft model", "Train a draft model on captured hidden states"),
        Command("evaluate", "Draft model", "Measure the acceptance length against the verifier"),
        Command("export", "Draft model", "Write a draft model for a serving engine"),
        Command("demo", "Try", "Run the whole pipeline on an embedded verifier, on CPU, offline"),
        Command(
            "bench", "Try", "Measure the training step for a verifier's shape, without its weights"
        ),
        Command("env", "Try", "Print versions, for a bug report"),
    )
}
