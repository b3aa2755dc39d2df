"""Whether what a checkpoint holds can be the state of the run that resumes it.

Checksums tell damage; these tell a state that another program, or a person, has written.
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
from speculators_cli.core.training.snapshot import MOMENTS, STEP

MOST_MORE = 64  # times as many packed sequences a step as the flags ask for
START_OVER = "Choose another checkpoint, or start over with `--no-resume-from-checkpoint`"


# Of the decoder layers: what tensors of the same shapes are computed with.
LAYER_VALUES = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def check_layers(checkpoint: Checkpoint, config: DraftConfig) -> None:
    """Refuse to go on with layers that compute otherwise, where the verifier's config changed.

    Raises:
        CheckpointError: Their RoPE, heads or norms are not those that the run began with.
    """
    saved = _object(checkpoint.config, "transformer_layer_config")
    rope, saved_rope = config.rope_parameters, _object(saved, "rope_parameters")
    layers = config.layers_json(vocab_size=config.vocab_size)
    found = {key: (saved.get(key), layers[key]) for key in LAYER_VALUES}
    # Earlier versions wrote keys as well that they did not compute with.
    found |= {f"RoPE {key}": (saved_rope.get(key), value) for key, value in rope.items()}
    if rope["rope_type"] == "longrope":
        key = "max_position_embeddings"
        found[key] = (saved.get(key), layers[key])
    for key, (before, now) in found.items():
        if before != now:
            raise CheckpointError(
                f"`{checkpoint.folder}` was trained with `{key}` `{before}`, this run would be "
                f"with `{now}`, by the verifier's config.json",
                hint="Bring back the verifier's config.json, or start over with "
                "`--no-resume-from-checkpoint`",
            )


def _object(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def check_tensors(checkpoint: Checkpoint, config: DraftConfig, *, frozen: Collection[str]) -> None:
    """Check names, shapes and types of weights and optimizer state; only headers are read.

    Args:
        checkpoint: What is resumed.
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
                    f"`{file}` has `{name}` {list(shape)} in {dtype}, the run needs "
                    f"{list(expected)} in F32",
                    hint=START_OVER,
                )


def _check_steps(checkpoint: Checkpoint, name: str) -> None:
    """Compare the optimizer's own count of steps with the state's."""
    state = checkpoint.state
    with refusing(CheckpointError), open_safetensors(checkpoint.folder / MOMENTS_NAME) as tensors:
        num_updates = tensors.get_tensor(name).item()
    num_skipped = state.step - num_updates
    # Earlier versions began to count skipped steps anew where a run was resumed.
    fits = num_skipped == state.num_skipped_steps if state.generation else num_skipped >= 0
    if not fits:
        raise CheckpointError(
            f"`{checkpoint.folder}` has step {state.step:,} with {state.num_skipped_steps:,} "
            f"skipped ones, its optimizer has made {num_updates:,.0f} updates",
            hint=START_OVER,
        )


def check_global_batch(
    checkpoint: Checkpoint, *, num_ranks: int, accumulation_steps: int, num_samples: int
) -> None:
    """Refuse a global batch that no flags can have asked for: an epoch would be planned by it.

    Raises:
        CheckpointError: It cannot be this run's.
    """
    global_batch = checkpoint.state.global_batch
    if global_batch > max(MOST_MORE * num_ranks * accumulation_steps, num_samples):
        raise CheckpointError(
            f"`{checkpoint.folder}` takes {global_batch:,} packed sequences an optimizer step, "
            f"there are {num_samples:,} samples",
            hint=START_OVER,
        )
    if global_batch % num_ranks:
        raise CheckpointError(
            f"`{checkpoint.folder}` takes {global_batch:,} packed sequences an optimizer step, "
            f"which {num_ranks} ranks cannot share evenly",
            hint=f"Start a number of ranks that divides {global_batch:,}",
        )


def check_progress(state: TrainState, loader: BatchSource, *, num_epochs: int) -> None:
    """Check that the steps done are those of the epochs done, by the plans of the epochs.

    Raises:
        CheckpointError: No run has been there.
    """
    step = state.step_in_epoch
    # Where samples have changed since, what earlier epochs took is not known.
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
            f"{state.epoch:,}: the samples give no such step",
            hint=START_OVER,
        )
