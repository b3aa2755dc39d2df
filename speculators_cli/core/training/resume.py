"""The state a run starts from: step 0, or its latest checkpoint."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.drafts.checkpoint_reader import Checkpoint
from speculators_cli.core.errors import CheckpointError, DataError
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.checkpoint_checks import (
    check_global_batch,
    check_layers,
    check_tensors,
)
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.settings.algorithms import ALGORITHM_SETTINGS
from speculators_cli.settings.base import Change, changes_on_resume
from speculators_cli.settings.train import TrainSettings

# Parts of an engine's fingerprint that may change the rounding of hidden states, and nothing else.
VERSIONS = ("torch", "transformers", "vllm")


@dataclass(frozen=True)
class Start:
    """The state a run starts from, the same on every rank."""

    state: TrainState
    is_resumed: bool
    checkpoint: Checkpoint | None  # the one to resume, on rank 0


def find_start(
    settings: TrainSettings,
    inputs: Inputs,
    ranks: Ranks,
    folder: RunFolder | None,
    progress: Progress,
) -> Start:
    """Choose the state to start from on rank 0, and share it.

    Raises:
        CheckpointError: Settings, ranks or the vocabulary map do not fit the checkpoint.
        DataError: The samples differ from those at the start of the run.
    """
    checkpoint = folder.latest if folder is not None else None
    text = None
    for damaged in folder.damaged if folder is not None else []:
        assert checkpoint is not None, "another one is resumed"
        progress.warn(
            f"`{damaged.folder}` is damaged and not resumed: {damaged.reason}",
            hint=f"`{checkpoint.folder}` is resumed instead",
        )
    if ranks.is_first:
        if checkpoint is not None:
            state = resumed_state(checkpoint, settings, inputs, ranks, progress)
        else:
            run_id = folder.run_id if folder is not None else "dry-run"
            state = first_state(settings, inputs, ranks, run_id=run_id)
            state = replace(state, generation=folder.generation if folder is not None else 1)
        text = json.dumps({"state": asdict(state), "is_resumed": checkpoint is not None})
    shared = json.loads(ranks.share("start", text))
    return Start(TrainState.from_json(shared["state"]), shared["is_resumed"], checkpoint)


def first_state(
    settings: TrainSettings, inputs: Inputs, ranks: Ranks, *, run_id: str
) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(
        step=0,
        epoch=0,
        step_in_epoch=0,
        run_id=run_id,
        started_at=time.time(),
        global_batch=ranks.num_ranks * settings.optimizer.gradient_accumulation_steps,
        num_ranks=ranks.num_ranks,
        data_hash=inputs.samples.data_hash,
        vocab_map_hash=inputs.vocab_map.hash,
        settings=settings.model_dump(mode="json"),
        best=None,
        num_skipped_steps=0,
        metrics={},
        content_hash=inputs.samples.content_hash,
        has_same_data=True,
    )


def resumed_state(
    checkpoint: Checkpoint,
    settings: TrainSettings,
    inputs: Inputs,
    ranks: Ranks,
    progress: Progress,
) -> TrainState:
    """The state in a checkpoint, after checking that the run is compatible with it.

    Raises:
        CheckpointError: Settings, ranks or the vocabulary map do not fit the checkpoint.
        DataError: The samples differ from those at the start of the run.
    """
    saved = checkpoint.state
    _check_settings(saved, settings, checkpoint, progress)
    config = inputs.draft_config(settings)
    ids = checkpoint.config.get(config.layer_ids_key)
    if ids != list(inputs.layer_ids.ids):
        raise CheckpointError(
            f"`{checkpoint.folder}` was trained on the verifier layers {ids}, but this run uses "
            f"{list(inputs.layer_ids.ids)}",
            hint="Pass the same `--target-layer-ids`, or start over with "
            "`--no-resume-from-checkpoint`",
        )
    if saved.vocab_map_hash != inputs.vocab_map.hash:
        raise CheckpointError(
            f"`{checkpoint.folder}` was trained with another draft vocabulary",
            hint="Pass the same `--draft-vocab-size`, or `--d2t-path` and `--t2d-path`, or start "
            "over with `--no-resume-from-checkpoint`",
        )
    change = find_data_change(saved, inputs)
    if change is not None and not settings.data.allow_changed_data:
        raise DataError(
            f"The samples are not the ones that `{checkpoint.folder}` was trained on: {change}",
            hint="Restore the same samples, or pass `--allow-changed-data`",
        )
    check_global_batch(
        checkpoint,
        num_ranks=ranks.num_ranks,
        accumulation_steps=settings.optimizer.gradient_accumulation_steps,
        num_samples=len(inputs.samples),
    )
    check_layers(checkpoint, config)
    frozen = ALGORITHMS[config.algorithm].frozen_weights(settings.algorithm_settings)
    check_tensors(checkpoint, config, frozen=frozen)
    accumulation = settings.optimizer.gradient_accumulation_steps
    if accumulation * ranks.num_ranks != saved.global_batch:
        progress.warn(
            f"Each rank accumulates {saved.global_batch // ranks.num_ranks} packed sequences, not "
            f"{accumulation}, to keep the global batch at {saved.global_batch}"
        )
    return replace(
        saved,
        num_ranks=ranks.num_ranks,
        data_hash=inputs.samples.data_hash,
        content_hash=inputs.samples.content_hash,
        has_same_data=saved.has_same_data and change is None,
        settings=settings.model_dump(mode="json"),
    )


def _permit(changed: str, settings: TrainSettings, progress: Progress, *, hint: str) -> None:
    """Warn of a change that `--allow-changed-data` permits, and refuse it without.

    Raises:
        CheckpointError: It is not permitted.
    """
    if not settings.data.allow_changed_data:
        raise CheckpointError(changed, hint=hint)
    progress.warn(changed)


def with_packing(
    start: Start, fingerprint: str, settings: TrainSettings, progress: Progress
) -> Start:
    """The start with the fingerprint of the packing of the first epoch, after checking it.

    Raises:
        CheckpointError: An epoch began with another one, and is not finished.
    """
    state = start.state
    if start.is_resumed and state.packing != fingerprint:
        # Earlier versions saved no fingerprint.
        are = "are" if state.packing is not None else "may be"
        changed = f"Samples {are} packed in another order than when the run began"
        if state.step_in_epoch:
            _permit(
                f"{changed}; the rest of epoch {state.epoch:,}, after its step "
                f"{state.step_in_epoch:,}, would repeat some samples and leave out others",
                settings,
                progress,
                hint="Resume with the version of this package that began the run, start over "
                "with `--no-resume-from-checkpoint`, or pass `--allow-changed-data`",
            )
        else:
            progress.warn(changed)
        state = replace(state, has_same_data=False)
    return replace(start, state=replace(state, packing=fingerprint))


def with_verifier(
    start: Start, fingerprint: str, settings: TrainSettings, progress: Progress
) -> Start:
    """The start with the fingerprint of the verifier's weights, after checking them.

    Raises:
        CheckpointError: The run was started with other weights.
    """
    # Earlier versions saved no fingerprint.
    if start.is_resumed and start.state.verifier_hash not in (None, fingerprint):
        _permit(
            f"The weights of verifier `{settings.draft.verifier_name_or_path}` differ from "
            "those at the start of the run",
            settings,
            progress,
            hint="Restore the same verifier, or pass `--allow-changed-data` if its samples "
            "and weights may change",
        )
    return replace(start, state=replace(start.state, verifier_hash=fingerprint))


def with_engine(
    start: Start, fingerprint: Mapping[str, str] | None, settings: TrainSettings, progress: Progress
) -> Start:
    """The start with the fingerprint of the engine that computes hidden states, after checking it.

    Args:
        start: The state to start from.
        fingerprint: Of the engine; None if hidden states are stored.
        settings: Of the run.
        progress: Receives a warning of other versions.

    Raises:
        CheckpointError: The run was started with another verifier, precision or source.
    """
    engine = None if fingerprint is None else dict(fingerprint)
    if start.is_resumed:
        before, now = start.state.engine or {}, engine or {}
        changed = [
            f"  {key}: `{before.get(key)}` then, `{now.get(key)}` now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        are_versions = before.keys() == now.keys() and all(
            before[key] == now[key] for key in now.keys() - set(VERSIONS)
        )
        if changed:
            _report_engine(changed, are_versions or settings.data.allow_changed_data, progress)
    return replace(start, state=replace(start.state, engine=engine))


def _report_engine(changed: Sequence[str], is_allowed: bool, progress: Progress) -> None:
    text = "\n".join(["Hidden states were computed differently before:", *changed])
    if is_allowed:
        progress.warn(text)
        return
    raise CheckpointError(
        text,
        hint="Use the same verifier, `--capture` and `--capture-dtype`, or pass "
        "`--allow-changed-data`",
    )


def find_data_change(saved: TrainState, inputs: Inputs) -> str | None:
    """How the samples differ from those at the start of the run."""
    if saved.data_hash != inputs.samples.data_hash:
        return "names or sizes differ"
    # Earlier versions saved no hash of the contents.
    if saved.content_hash not in (None, inputs.samples.content_hash):
        return "names and sizes are the same, contents differ"
    return None


def _check_settings(
    saved: TrainState, settings: TrainSettings, checkpoint: Checkpoint, progress: Progress
) -> None:
    others = ALGORITHM_SETTINGS.keys() - {settings.draft.algorithm}
    changes = changes_on_resume(saved.settings, settings, unread=others)
    refused = [x for x in changes if x.kind == "refused" and not _confirms_a_guess(x)]
    if refused:
        lines = [f"  `{c.name}` is `{c.new}`, the run began with `{c.old}`" for c in refused]
        raise CheckpointError(
            "\n".join([f"`{checkpoint.folder}` cannot be resumed with different settings", *lines]),
            hint="Use the old values, or start over with `--no-resume-from-checkpoint`",
        )
    for change in (x for x in changes if x.kind == "warned"):
        progress.warn(f"`{change.name}` is now `{change.new}`, the run began with `{change.old}`")


def _confirms_a_guess(change: Change) -> bool:
    """Whether layer ids are set that were unset at the start; they are compared separately."""
    return change.name == "--target-layer-ids" and change.old is None
