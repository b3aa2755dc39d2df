"""The draft vocabulary of a training run that is given conversations: counted in its tokens."""

from pathlib import Path

from speculators_cli.core.preparation.vocabulary import build_vocab_map
from speculators_cli.core.progress import Progress
from speculators_cli.settings.build_vocab_map import BuildVocabMapSettings
from speculators_cli.settings.train import TrainSettings


def write_training_vocabulary(settings: TrainSettings, *, progress: Progress) -> TrainSettings:
    """Choose the draft vocabulary by the tokens of the run, and write its maps beside them.

    Each rank counts by itself: all write the same maps, atomically.

    Args:
        settings: The data path is the folder of tokens, and the vocabulary has a size.
        progress: Reports the coverage.

    Returns:
        The settings with the maps in place of the size.

    Raises:
        SettingsError: The verifier has fewer tokens.
        DataError: The tokens cannot be used, or none are supervised.
    """
    draft = settings.draft
    (folder,) = settings.data.data_path
    # A refused run with another size leaves the maps of the run that is there.
    output_dir = folder / f"vocab-{draft.draft_vocab_size}"
    report = build_vocab_map(
        BuildVocabMapSettings.model_validate(
            {
                "vocabulary": {
                    "verifier_name_or_path": draft.verifier_name_or_path,
                    "draft_vocab_size": draft.draft_vocab_size,
                    "trust_remote_code": draft.trust_remote_code,
                },
                "counts": {"data_path": (folder,)},
                "files": {"output_dir": output_dir},
            }
        ),
        progress=progress,
    )
    progress.info(
        f"The draft vocabulary keeps {report.draft_vocab_size:,} of {report.vocab_size:,} tokens, "
        f"{report.coverage:.1%} of the supervised ones"
    )
    maps: dict[str, Path | None] = {"d2t_path": report.d2t_path, "t2d_path": report.t2d_path}
    maps["draft_vocab_size"] = None
    return settings.model_copy(update={"draft": draft.model_copy(update=maps)})
