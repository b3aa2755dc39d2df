"""Warm start: a run that starts from the weights of a trained draft, and keeps its shape."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.data_config import LayerIds
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.drafts.trained_draft import TrainedDraft, read_draft
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.models.verifier import load_embedding
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import VerifierShape, read_verifier_shape
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.base import flag_of
from speculators_cli.settings.loading import check_settings
from speculators_cli.settings.train import TrainSettings

FLAG = "--from-checkpoint"
ROWS_AT_ONCE = 4096  # of an embedding, cast in memory
ROUNDING = 2**-7  # bfloat16 keeps 8 bits; either side may have been rounded


def read_warm_start(
    settings: TrainSettings, progress: Progress = SILENT
) -> tuple[TrainSettings, TrainedDraft | None]:
    """The draft to start from, if any, and the settings with the values that it has.

    Warns of values that the settings change.

    Raises:
        SettingsError: A setting contradicts the draft.
        CheckpointError: The draft is incomplete.
        MachineError: The hub cannot be reached.
    """
    draft = settings.draft
    if draft.from_checkpoint is None:
        return settings, None
    source = read_draft(
        draft.from_checkpoint,
        Overrides(
            verifier_name_or_path=draft.verifier_name_or_path,
            target_layer_ids=draft.target_layer_ids,
            read_verifier=lambda name: read_verifier_shape(
                VerifierFiles(name), trust_remote_code=draft.trust_remote_code
            ),
        ),
        flag=FLAG,
    )
    source = _adopt(source, settings)
    config = source.config
    fixed: dict[str, dict[str, Any]] = {
        "draft": {
            # First: what else differs follows from it.
            "algorithm": config.algorithm,
            "num_layers": config.num_layers,
            "draft_arch": config.arch,
            "full_vocab": source.vocab_map.is_full,
        },
        config.algorithm: source.algorithm.fixed_settings(config),
    }
    # Unset fields stay unset: only maps that were passed are compared with the draft's.
    content = settings.model_dump(exclude_unset=True)
    for section, values in fixed.items():
        given = getattr(settings, section)
        for name, value in values.items():
            if name in given.model_fields_set and getattr(given, name) != value:
                raise SettingsError(
                    f"`{flag_of(name)}` is `{getattr(given, name)}`, but the draft in "
                    f"`{source.name}` has `{value}`",
                    hint=f"Leave it out: `{FLAG}` fixes the shape of the draft",
                )
        content[section] = content.get(section, {}) | values
    kept = source.algorithm.kept_settings(config, settings.algorithm_settings)
    given = settings.algorithm_settings
    for name, value in kept.items():
        if name not in given.model_fields_set:
            content[config.algorithm][name] = value
        elif getattr(given, name) != value:
            progress.warn(
                f"The draft in `{source.name}` was trained with `{flag_of(name)}` "
                f"`{_shown(value)}`; it is trained further with `{_shown(getattr(given, name))}`"
            )
    return check_settings(type(settings), content), source


def _shown(value: object) -> str:
    """A value as one would type it."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _adopt(source: TrainedDraft, settings: TrainSettings) -> TrainedDraft:
    """The draft as one of the algorithm of the run, if that can start from it."""
    chosen = settings.draft.algorithm
    if chosen == source.algorithm.name or "algorithm" not in settings.draft.model_fields_set:
        return source
    config = ALGORITHMS[chosen].adopt(source.config, settings.algorithm_settings)
    return source if config is None else replace(source, config=config)


def check_fit(source: TrainedDraft, verifier: VerifierShape, vocab_size: int) -> None:
    """Check that a draft is for a verifier.

    Raises:
        SettingsError: The sizes differ.
    """
    config = source.config
    for word, found, expected in (
        ("hidden size", config.hidden_size, verifier.hidden_size),
        ("verifier hidden size", config.target_hidden_size, verifier.hidden_size),
        ("vocabulary", config.vocab_size, vocab_size),
    ):
        if found != expected:
            raise SettingsError(
                f"`{FLAG}`: `{source.name}` has {word} {found:,}, verifier "
                f"`{verifier.name_or_path}` {expected:,}",
                hint=f"Pass a draft that was trained for this verifier, or leave `{FLAG}` out",
            )


def check_embedding(source: TrainedDraft, files: VerifierFiles, verifier: VerifierShape) -> None:
    """Check that a draft's own embedding is the verifier's, which training uses.

    Raises:
        SettingsError: They differ.
        MachineError: A file of the hub cannot be fetched.
    """
    if source.embedding is None:
        return
    embedding = load_embedding(files)
    rows = zip(source.embedding.split(ROWS_AT_ONCE), embedding.split(ROWS_AT_ONCE), strict=True)
    if not all(_is_close(own.float(), given.float()) for own, given in rows):
        raise SettingsError(
            f"`{FLAG}`: `{source.name}` has its own embedding, which differs from that of "
            f"verifier `{verifier.name_or_path}` used in training",
            hint="Pass the verifier that the draft was trained for as `--verifier-name-or-path`",
        )


def _is_close(own: Tensor, given: Tensor) -> bool:
    """Whether rows are equal up to rounding to bfloat16 or float16."""
    smallest = float(given.abs().mean()) * ROUNDING
    return torch.allclose(own, given, rtol=ROUNDING, atol=smallest)


def choose_vocab_map(source: TrainedDraft, settings: TrainSettings) -> VocabMap:
    """The draft's own vocabulary; maps that were passed must match it.

    Raises:
        SettingsError: They do not match.
    """
    draft = settings.draft
    are_given = {"d2t_path", "t2d_path"} & draft.model_fields_set
    are_there = draft.d2t_path.is_file() and draft.t2d_path.is_file()
    if not source.vocab_map.is_full and are_given and are_there:
        given = VocabMap.load(draft.d2t_path, draft.t2d_path)
        if given.hash != source.vocab_map.hash:
            raise SettingsError(
                f"`{draft.d2t_path}` is not the draft vocabulary of `{source.name}`",
                hint=f"Leave out `--d2t-path` and `--t2d-path`: `{FLAG}` has its own",
            )
    return source.vocab_map


def choose_layer_ids(
    source: TrainedDraft, found: LayerIds, *, is_given: bool, progress: Progress
) -> LayerIds:
    """The layers of the samples, which must be the draft's.

    Samples without layer ids are assumed to have the layers of the draft, which is still a guess.
    If both were assumed, the guess is the same as for a run from scratch on these samples.

    Raises:
        DataError: The samples have other layers.
    """
    own = source.config.target_layer_ids
    is_as_many = len(found.ids) == len(own)
    if is_given or found.ids == own:
        return found
    if source.config.are_layer_ids_assumed and is_as_many:
        progress.warn(
            f"The verifier layers {list(own)} of the draft in `{source.name}` were assumed; it is "
            f"trained on the samples' {list(found.ids)}"
        )
        return found
    if found.is_assumed and is_as_many:
        return LayerIds(own, is_assumed=True)
    raise DataError(
        f"The samples have the verifier layers {list(found.ids)}, the draft in `{source.name}` "
        f"reads {list(own)}",
        hint="Capture samples of those layers, or pass `--target-layer-ids` to train on these",
    )
