"""Checks that the contents of a checkpoint can be the state of the run that resumes it.

Checksums detect corruption; these checks detect a state written by another program or by hand.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.drafts.checkpoint_reader import MOMENTS_NAME, Checkpoint
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.repo_files import WEIGHTS_NAME
from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.reading import open_safetensors, refusing
from speculators_cli.core.training.adamw import MOMENTS, STEP

MOST_MORE = 64  # times as many packed sequences per step as the flags set
START_OVER = "Choose another checkpoint, or start over with `--no-resume-from-checkpoint`"


# Values of the decoder layers that do not change the shapes of tensors.
LAYER_VALUES = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def check_layers(checkpoint: Checkpoint, config: DraftConfig) -> None:
    """Refuse to resume with layers that compute differently because the verifier's config changed.

    Raises:
        CheckpointError: Their RoPE, heads or norms differ from those at the start of the run.
    """
    saved = _object(checkpoint.config, "transformer_layer_config")
    rope, saved_rope = config.rope_parameters, _object(saved, "rope_parameters")
    layers = config.layers_json(vocab_size=config.vocab_size)
    found = {key: (saved.get(key), layers[key]) for key in LAYER_VALUES}
    # Earlier versions also wrote keys that they did not use.
    found |= {f"RoPE {key}": (saved_rope.get(key), value) for key, value in rope.items()}
    if rope["rope_type"] == "longrope":
        key = "max_position_embeddings"
        found[key] = (saved.get(key), layers[key])
    for key, (before, now) in found.items():
        if before != now:
            raise CheckpointError(
                f"`{checkpoint.folder}` was trained with `{key}` `{before}`, but the "
                f"verifier's config.json has `{now}`",
                hint="Restore the verifier's config.json, or start over with "
                "`--no-resume-from-checkpoint`",
            )


def _object(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def check_tensors(checkpoint: Checkpoint, config: DraftConfig, *, frozen: Collection[str]) -> None:
    """Check names, shapes and types of weights and optimizer state; only headers are read.

    Args:
        checkpoint: The checkpoint to resume.
        config: Of the draft.
        frozen: Weights without optimizer state.

    Raises:
        CheckpointError: They are not those of the draft.
    """
    shapes = config.tensor_shapes()
    trained = {name: x for name, x in shapes.items() if name not in frozen}
    moments = {f"{name}.{kind}": shape for name, shape in trained.items() for kind in MOMENTS}
    moments |= {f"{name}.{STEP}": () for name in trained}
    _check_file(checkpoint.folder / WEIGHTS_NAME, shapes)
    _check_file(checkpoint.folder / MOMENTS_NAME, moments)
    _check_steps(checkpoint, f"{next(iter(trained))}.{STEP}")


def _check_file(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    with refusing(CheckpointError), open_safetensors(file, fix=START_OVER) as tensors:
        for name, expected in shapes.items():
            part = tensors.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if (shape, dtype) != (expected, "F32"):
                raise CheckpointError(
                    f"`{file}` has `{name}` {list(shape)} in {dtype}, expected "
                    f"{list(expected)} in F32",
                    hint=START_OVER,
                )


def _check_steps(checkpoint: Checkpoint, name: str) -> None:
    """Compare the optimizer's step count with that of the state."""
    state = checkpoint.state
    with refusing(CheckpointError), open_safetensors(checkpoint.folder / MOMENTS_NAME) as tensors:
        num_updates = tensors.get_tensor(name).item()
    num_skipped = state.step - num_updates
    # Earlier versions reset the count of skipped steps when a run was resumed.
    fits = num_skipped == state.num_skipped_steps if state.generation else num_skipped >= 0
    if not fits:
        raise CheckpointError(
            f"`{checkpoint.folder}` is at step {state.step:,} with {state.num_skipped_steps:,} "
            f"skipped steps, but its optimizer made {num_updates:,.0f} updates",
            hint=START_OVER,
        )


def check_global_batch(
    checkpoint: Checkpoint, *, num_ranks: int, accumulation_steps: int, num_samples: int
) -> None:
    """Refuse a global batch that no flags can have set: the packing of epochs depends on it.

    Raises:
        CheckpointError: It cannot be this run's.
    """
    global_batch = checkpoint.state.global_batch
    if global_batch > max(MOST_MORE * num_ranks * accumulation_steps, num_samples):
        raise CheckpointError(
            f"`{checkpoint.folder}` uses {global_batch:,} packed sequences per optimizer step, "
            f"but there are {num_samples:,} samples",
            hint=START_OVER,
        )
    if global_batch % num_ranks:
        raise CheckpointError(
            f"`{checkpoint.folder}` uses {global_batch:,} packed sequences per optimizer step, "
            f"which is not divisible by {num_ranks} ranks",
            hint=f"Start a number of ranks that divides {global_batch:,}",
        )


def check_progress(state: TrainState, loader: BatchSource, *, num_epochs: int) -> None:
    """Check that the finished steps match the finished epochs, by the packing of the epochs.

    Raises:
        CheckpointError: No run can have reached this state.
    """
    step = state.step_in_epoch
    # If samples have changed since, the steps of earlier epochs are unknown.
    for epoch in range(state.epoch if state.has_same_data else 0):
        step += loader.steps_in(epoch)
        if step > state.step:
            break
    is_possible = step == state.step or not state.has_same_data
    if state.epoch < num_epochs:
        is_possible = is_possible and state.step_in_epoch <= loader.steps_in(state.epoch)
    if not is_possible:
        raise CheckpointError(
            f"The checkpoint is at step {state.step:,}, step {state.step_in_epoch:,} of epoch "
            f"{state.epoch:,}, which these samples do not have",
            hint=START_OVER,
        )
