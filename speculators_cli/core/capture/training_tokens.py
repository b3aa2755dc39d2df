"""Tokens of a training run that is given conversations: written once, before it starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from speculators_cli.core.capture.generate import generate_data
from speculators_cli.core.capture.generated_folder import GeneratedFolder
from speculators_cli.core.errors import DataError, SettingsError, rewording
from speculators_cli.core.progress import Progress
from speculators_cli.settings.generate_data import GenerateDataSettings
from speculators_cli.settings.train import TrainSettings

REGENERATE = "Write the tokens with `speculators generate-data --tokens-only --regenerate`"


def write_training_tokens(settings: TrainSettings, *, progress: Progress) -> TrainSettings:
    """Render the conversations of a run into shards of tokens in its save path.

    Each rank renders shards of its own. Shards that are there already are kept.

    Returns:
        The settings with the folder of the shards as data path.

    Raises:
        SettingsError: The verifier has no tokenizer or template, or the save path has tokens of
            other conversations.
        DataError: The conversations cannot be used.
    """
    save_path, draft = settings.run.save_path, settings.draft
    generated = GenerateDataSettings.model_validate(
        {
            "input": {"prompts": str(settings.data.conversations), "output_dir": save_path},
            "verifier": {
                "verifier_name_or_path": draft.verifier_name_or_path,
                "target_layer_ids": draft.target_layer_ids,
                "trust_remote_code": draft.trust_remote_code,
            },
            "tokens": {"total_seq_len": settings.data.total_seq_len, "tokens_only": True},
            "engine": {"device": "cpu"},  # which only renders
        }
    )
    with (
        _keeping_environment(),
        rewording({"--output-dir": "--save-path"}, of=SettingsError),
        rewording({"Pass `--regenerate`": REGENERATE}, of=DataError),
    ):
        generate_data(generated, progress=progress)
    data = settings.data.model_copy(update={"data_path": (GeneratedFolder(save_path).tokens,)})
    return settings.model_copy(update={"data": data})


@contextmanager
def _keeping_environment() -> Iterator[None]:
    """Leave the variables of a Slurm task to the run, which adopts them itself."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
