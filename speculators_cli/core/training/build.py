"""build_trainer(): every part of a training run, from its settings and inputs."""

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.loader import BatchLoader, BatchSource
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.kernels.support import use_fast_kernels, use_float8_products
from speculators_cli.core.models.verifier import FrozenVerifier, load_frozen_verifier
from speculators_cli.core.progress import Progress
from speculators_cli.core.signals import StopSignals
from speculators_cli.core.training.checkpoint_checks import check_progress
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.loggers import SafeLogger
from speculators_cli.core.training.optimizer import Optimizer, learning_rate
from speculators_cli.core.training.optimizer_step import OptimizerStep
from speculators_cli.core.training.placement import place_weights
from speculators_cli.core.training.resume import Start, with_engine, with_packing, with_verifier
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.run_log import RunLog
from speculators_cli.core.training.sample_check import check_samples
from speculators_cli.core.training.saver import Saver
from speculators_cli.core.training.snapshot import restore
from speculators_cli.core.training.start_up import StartUp
from speculators_cli.core.training.states import StoredStates
from speculators_cli.core.training.trainer import Trainer
from speculators_cli.core.training.weights import DraftWeights
from speculators_cli.settings.base import Settings
from speculators_cli.settings.train import TrainSettings

if TYPE_CHECKING:
    from speculators_cli.core.training.live_capture import LiveVerifier


def build_trainer(
    settings: TrainSettings,
    inputs: Inputs,
    ranks: Ranks,
    start: Start,
    folder: RunFolder | None,
    logger: SafeLogger | None,
    progress: Progress,
    signals: StopSignals,
    start_up: StartUp,
) -> Trainer:
    """Load the verifier's frozen parts, build and shard the draft, restore its state."""
    live = None
    with ExitStack() as on_error:
        # Live samples are only known once the verifier is.
        is_live = inputs.is_live
        loader = None if is_live else start_reading(settings, inputs, ranks, start, on_error)
        frozen = load_frozen_verifier(
            inputs.verifier_files, inputs.verifier_config, progress=progress
        )
        if is_live:
            # Importing what runs the whole verifier takes seconds.
            from speculators_cli.core.training.live_capture import load_live_verifier

            live = load_live_verifier(settings, inputs, frozen, ranks)
            on_error.callback(live.engine.close)
        verifier = live.frozen if live is not None else frozen.to(ranks.device)
        start_up.end("verifier")
        start = with_engine(start, live.fingerprint if live else None, settings, progress)
        if settings.data.check_samples and not start.is_resumed:
            check_all_samples(settings, inputs, verifier, live, progress)
        start_up.end("sample check")
        start = with_verifier(start, verifier.fingerprint, settings, progress)
        if live is not None:
            inputs = live.open_cache(settings, inputs)
        loader = loader or start_reading(settings, inputs, ranks, start, on_error)
        start = with_packing(start, loader.pack(0).fingerprint, settings, progress)
        draft = build_draft(settings, inputs, verifier)
        if not (inputs.needs_whole_verifier(settings) or inputs.vocab_map.is_full):
            verifier.rest_head(frozen.head)
        compute_dtype = choose_compute_dtype(settings.distributed.compute_dtype, ranks.device)
        weights = place_weights(
            draft,
            ranks,
            settings.distributed.sharding,
            compute_dtype,
            num_accumulated=-(-start.state.global_batch // ranks.num_ranks),
        )
        optimizer = Optimizer(weights, settings.optimizer, use_fast_kernels=draft.use_fast_kernels)
        if start.is_resumed:
            restore_state(start, weights, optimizer)
        validation_loader = None
        if len(inputs.validation_samples):
            validation_loader = build_loader(
                settings, inputs.validation_samples, ranks, ranks.num_ranks, is_validation=True
            )
        if start.is_resumed:
            check_progress(start.state, loader, num_epochs=settings.run.epochs)
        total_steps = count_steps(settings, loader)
        start_up.end("draft")
        trainer = Trainer(
            optimizer_step=OptimizerStep(
                weights,
                ranks,
                optimizer,
                compute_dtype=compute_dtype,
                noise_std=settings.data.noise_std,
                seed=settings.run.seed,
                filler=live.fills(settings.capture) if live is not None else StoredStates(),
            ),
            rate=partial(
                learning_rate,
                peak=settings.optimizer.lr,
                total_steps=total_steps,
                settings=settings.schedule,
            ),
            loader=read_ahead(loader, inputs.samples, live),
            validation_loader=validation_loader
            and read_ahead(validation_loader, inputs.validation_samples, live),
            state=start.state,
            num_epochs=settings.run.epochs,
            total_steps=total_steps,
            log_every_steps=settings.run.log_every_steps,
            max_skipped_steps=settings.optimizer.max_skipped_steps,
            checkpoint_every_steps=settings.checkpoints.checkpoint_every_steps,
            patience=settings.run.early_stopping_patience,
            saver=Saver(
                folder, ranks, keep=settings.checkpoints.keep_checkpoints, progress=progress
            ),
            signals=signals,
            is_saved=start.is_resumed,
            log=RunLog(
                ranks=ranks,
                samples=inputs.samples,
                draft=draft,
                num_epochs=settings.run.epochs,
                total_steps=total_steps,
                logger=logger,
                progress=progress,
                start_up=start_up,
            ),
        )
        on_error.pop_all()  # from here on, the loaders of the trainer end it
        return trainer


def start_reading(
    settings: TrainSettings, inputs: Inputs, ranks: Ranks, start: Start, on_error: ExitStack
) -> BatchLoader:
    """The loader, which reads the first batches while the run is still being built."""
    loader = build_loader(settings, inputs.samples, ranks, start.state.global_batch)
    on_error.callback(loader.close)
    loader.read_ahead_from(start.state.epoch, start.state.step_in_epoch)
    return loader


def restore_state(start: Start, weights: DraftWeights, optimizer: Optimizer) -> None:
    """Restore weights and optimizer from the checkpoint, which rank 0 has; all ranks must call."""
    checkpoint = start.checkpoint
    restore(
        weights,
        optimizer.adamw,
        weights=checkpoint.read_tensors() if checkpoint else {},
        moments=checkpoint.read_trainer_tensors() if checkpoint else {},
    )
    weights.publish()
    optimizer.num_skipped.fill_(start.state.num_skipped_steps)


def read_ahead(
    loader: BatchSource, samples: SampleSource, live: "LiveVerifier | None"
) -> BatchSource:
    """The loader, or one that requests hidden states of live samples ahead."""
    return live.read_ahead(loader, samples) if live is not None and samples.is_live else loader


def check_all_samples(
    settings: TrainSettings,
    inputs: Inputs,
    verifier: FrozenVerifier,
    live: "LiveVerifier | None",
    progress: Progress,
) -> None:
    """Check samples to train on, and those of a folder for validation.

    Raises:
        DataError: Stored hidden states are marked incorrectly, or the draft cannot learn from the
            samples.
        MachineError: Hidden states that the verifier computes cannot be right.
    """
    algorithm = ALGORITHMS[settings.draft.algorithm]
    algorithm.check_samples(inputs.draft_config(settings), inputs.samples)
    checked = [(inputs.samples, settings.data.data_path)]
    if settings.data.val_data_path and len(inputs.validation_samples):
        checked.append((inputs.validation_samples, settings.data.val_data_path))
    for samples, folders in checked:
        if not samples.is_live:
            check_samples(samples, verifier, folder=folders[0], progress=progress)
        elif live is not None:
            live.check(samples, progress)


def count_steps(settings: TrainSettings, loader: BatchSource) -> int:
    """Optimizer steps of the whole run."""
    of_epochs = sum(loader.steps_in(epoch) for epoch in range(settings.run.epochs))
    return settings.run.limit_steps(of_epochs)


def build_draft(settings: TrainSettings, inputs: Inputs, verifier: FrozenVerifier) -> DraftModel:
    """A fresh or a trained draft on the device of the verifier's frozen parts."""
    algorithm, config = ALGORITHMS[settings.draft.algorithm], inputs.draft_config(settings)
    kernels = choose_train_kernels(settings, config, verifier.head.device)
    draft = algorithm.build(
        config,
        verifier,
        inputs.vocab_map,
        settings.algorithm_settings,
        use_fast_kernels=kernels.are_fast,
        seed=settings.run.seed,
    )
    draft.use_float8 = kernels.in_float8
    if inputs.source is not None:
        # A draft of another algorithm lacks some.
        draft.load_state_dict({**draft.state_dict(), **inputs.source.weights})
    return draft


class Kernels(NamedTuple):
    """How a step is computed."""

    are_fast: bool
    in_float8: bool  # its matrix products


def choose_train_kernels(
    settings: TrainSettings, config: DraftConfig, device: torch.device
) -> Kernels:
    """`--kernels` and `--gemm-dtype`, resolved."""
    own = settings.distributed
    return choose_kernels(
        own.kernels,
        own.gemm_dtype,
        choose_compute_dtype(own.compute_dtype, device),
        config,
        settings.algorithm_settings,
        device,
    )


def choose_kernels(
    given: str,
    gemm_dtype: str,
    compute_dtype: torch.dtype,
    config: DraftConfig,
    algorithm_settings: Settings,
    device: torch.device,
) -> Kernels:
    """How a step is computed on a device.

    Raises:
        MachineError: Fast kernels or float8 were requested where they cannot run.
    """
    algorithm = ALGORITHMS[config.algorithm]
    unsupported = algorithm.find_unsupported(config, algorithm_settings)
    not_float8 = unsupported
    if not algorithm.multiplies_in_float8:
        not_float8 = f"algorithm `{algorithm.name}` has none in float8"
    in_float8 = use_float8_products(gemm_dtype, device, unsupported=not_float8)
    are_fast = use_fast_kernels(
        given, device, compute_dtype, head_dim=config.head_dim, unsupported=unsupported
    )
    return Kernels(are_fast or in_float8, in_float8)


def build_loader(
    settings: TrainSettings,
    samples: SampleSource,
    ranks: Ranks,
    global_batch: int,
    *,
    is_validation: bool = False,
) -> BatchLoader:
    """Batches of this rank, over all epochs of a run or over one validation."""
    return load_batches(
        samples,
        ranks,
        total_seq_len=settings.data.total_seq_len,
        seed=settings.run.seed,
        global_batch=global_batch,
        num_epochs=1 if is_validation else settings.run.epochs,
        max_steps=None if is_validation else settings.run.max_steps,
        num_workers=settings.data.num_workers,
        prefetch_factor=settings.data.prefetch_factor,
    )


def load_batches(
    samples: SampleSource,
    ranks: Ranks,
    *,
    total_seq_len: int,
    seed: int,
    global_batch: int,
    num_epochs: int,
    max_steps: int | None,
    num_workers: int | None,
    prefetch_factor: int,
) -> BatchLoader:
    """A loader with threads and pinned memory for this rank."""
    if num_workers is None:
        num_workers = min(8, max(1, (os.cpu_count() or 1) // ranks.num_local_ranks))
    is_cuda = ranks.device.type == "cuda"
    return BatchLoader(
        samples,
        total_seq_len=total_seq_len,
        seed=seed,
        global_batch=global_batch,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        num_epochs=num_epochs,
        max_steps=max_steps,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=is_cuda,
        pads=is_cuda,
    )


def choose_compute_dtype(given: str, device: torch.device) -> torch.dtype:
    """`--compute-dtype`, resolved: by default bfloat16 on a GPU, float32 on CPU."""
    if given == "auto":
        given = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if given == "bfloat16" else torch.float32
