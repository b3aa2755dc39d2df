"""train(settings): build every part in order, then fit."""

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import torch

from speculators_cli.core.data.data_config import LayerIds
from speculators_cli.core.errors import MachineError, SpeculatorsError
from speculators_cli.core.files import check_output_dir, format_bytes
from speculators_cli.core.place import adopt_slurm, is_first_rank
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.signals import StopSignals
from speculators_cli.core.training.best import EVALUATED
from speculators_cli.core.training.build import build_trainer
from speculators_cli.core.training.distributed import Ranks, end_process, start_ranks
from speculators_cli.core.training.inputs import Inputs, read_inputs
from speculators_cli.core.training.loggers import SafeLogger, build_loggers
from speculators_cli.core.training.prompt_evaluation import (
    OpenEvaluation,
    PromptEvaluation,
    check_patience,
    keeping_random_state,
)
from speculators_cli.core.training.rehearsal import Rehearsal
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.resume import Start, find_start
from speculators_cli.core.training.run_end import RunEnd, recording_end
from speculators_cli.core.training.run_folder import RunFolder
from speculators_cli.core.training.save_path import INDEX_NAME, check_apart, check_save_path
from speculators_cli.core.training.start_up import StartUp
from speculators_cli.core.training.trainer import Trainer
from speculators_cli.core.training.warm_start import read_warm_start
from speculators_cli.settings.base import write_settings
from speculators_cli.settings.train import TrainSettings

# Errors without a type of their own are recognized by their message.
NO_ROOM_ON_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
NO_ROOM = ("DefaultCPUAllocator",)


def train(
    settings: TrainSettings,
    *,
    progress: Progress = SILENT,
    dry_run: bool = False,
    open_evaluation: OpenEvaluation | None = None,
    start_up: StartUp | None = None,
) -> TrainReport:
    """Train a draft model, from scratch or from the latest checkpoint in the save path.

    Args:
        settings: All settings of the run.
        progress: Reports progress.
        dry_run: Build everything, run one step, write nothing.
        open_evaluation: Loads what evaluates the draft on prompts after each epoch, if so set.
        start_up: Timer of the start; None: it begins here.

    Raises:
        SettingsError: A setting or one of its paths cannot be used; nothing was written.
        DataError: The samples cannot be used.
        CheckpointError: The save path contains files that cannot be resumed or replaced.
        MachineError: The disk, memory, device or hub failed.
        DivergedError: Gradients were not finite for too many consecutive steps.
        StoppedError: A signal stopped the run; its state is saved, if there is one.
    """
    started_at = time.perf_counter()
    start_up = start_up or StartUp()
    is_slurm = adopt_slurm(os.environ)
    check_output_dir(settings.run.save_path, flag="--save-path")
    if settings.run.logger_names:
        check_output_dir(settings.run.log_dir, flag="--log-dir")
    is_recorded = not dry_run and is_first_rank()
    if is_recorded:
        check_place(settings)
    end = RunEnd(settings.run.save_path)
    record = end.write if is_recorded else forget

    def end_now(error: SpeculatorsError) -> None:
        with suppress(OSError, SpeculatorsError):
            record(error)
        speaker.error(error)
        end_process(error)

    speaker = progress
    with (
        recording_end(record),
        StopSignals() as signals,
        start_ranks(
            settings.distributed.device,
            settings.distributed.timeout_seconds,
            signals=signals,
            end=end_now,
            is_slurm=is_slurm,
        ) as ranks,
    ):
        progress = progress if ranks.is_first else SILENT
        start_up.end("device")
        index_file = None if dry_run else settings.run.save_path / INDEX_NAME
        settings, source = ranks.first_then_others(
            "draft", lambda: read_warm_start(settings, progress)
        )
        inputs = ranks.first_then_others(
            "inputs",
            lambda: read_inputs(
                settings,
                source=source,
                num_ranks=ranks.num_ranks,
                index_file=index_file,
                progress=progress,
            ),
        )
        check_patience(settings, inputs)
        rehearsal = Rehearsal(settings, inputs, ranks)
        start_up.end("samples")
        with open_folder(settings, ranks, end, dry_run=dry_run) as folder:
            start = find_start(settings, inputs, ranks, folder, progress)
            ranks.connect(settings.distributed.timeout_seconds)
            start_up.end("save path")
            with (
                open_logger(settings, folder, start, progress) as logger,
                out_of_memory_explained(
                    settings.data.total_seq_len,
                    has_whole_verifier=inputs.needs_whole_verifier(settings),
                ),
                closing(
                    build_trainer(
                        settings, inputs, ranks, start, folder, logger, progress, signals, start_up
                    )
                ) as trainer,
            ):
                is_finished = trainer.is_finished
                if not is_finished:
                    trainer.evaluation = load_evaluation(
                        settings, inputs, trainer, open_evaluation, progress, start_up
                    )
                announce(settings, inputs, trainer, start, progress)
                if not is_finished:
                    rehearsal.wait(progress)
                    start_up.end("kernels")
                with ranks.ending_when_stuck():
                    run_steps(trainer, dry_run=dry_run)
            report = make_report(
                settings,
                trainer,
                start,
                inputs.layer_ids,
                duration_seconds=time.perf_counter() - started_at,
                was_already_finished=is_finished,
                is_dry_run=dry_run,
            )
            if folder is not None:
                folder.write_result({**report.to_json(), "exit_code": 0})
            return report


def run_steps(trainer: Trainer, *, dry_run: bool) -> None:
    """Train to the end, or for one step."""
    if dry_run:
        trainer.train_step(next(trainer.feed.steps(trainer.loader.epoch(0))))
    elif not trainer.is_finished:
        trainer.fit()


def load_evaluation(
    settings: TrainSettings,
    inputs: Inputs,
    trainer: Trainer,
    open_evaluation: OpenEvaluation | None,
    progress: Progress,
    start_up: StartUp,
) -> PromptEvaluation | None:
    """What evaluates the draft on prompts after each epoch, if so set."""
    if open_evaluation is None:
        return None
    ranks = trainer.ranks
    with keeping_random_state(ranks.device):
        evaluate = open_evaluation(settings, inputs, ranks, progress)
    start_up.end("evaluation")
    return PromptEvaluation(evaluate, trainer.optimizer_step.weights, inputs.vocab_map, ranks)


def forget(_error: SpeculatorsError) -> None:
    """Discard the error."""


def check_place(settings: TrainSettings) -> None:
    """Check, before anything is read or written, that no other files are in the way.

    Raises:
        SettingsError: The run would write into its samples.
        CheckpointError: The save path contains files that no run wrote.
    """
    save_path = settings.run.save_path
    check_apart(save_path, (*settings.data.data_path, *settings.data.val_data_path))
    check_save_path(save_path, resume=settings.run.resume_from_checkpoint)


@contextmanager
def open_folder(
    settings: TrainSettings, ranks: Ranks, end: RunEnd, *, dry_run: bool
) -> Iterator[RunFolder | None]:
    """The save path, locked and cleaned, on rank 0."""
    if dry_run or not ranks.is_first:
        yield None
        return
    with RunFolder.open(
        settings.run.save_path,
        resume=settings.run.resume_from_checkpoint,
        is_restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0,
    ) as folder:
        write_settings(settings, folder.settings_file)
        with end.begun():
            yield folder


@contextmanager
def open_logger(
    settings: TrainSettings, folder: RunFolder | None, start: Start, progress: Progress
) -> Iterator[SafeLogger | None]:
    """The metric loggers on rank 0, closed at the end in every case."""
    if folder is None:
        yield None
        return
    logger = build_loggers(
        settings.run.logger_names,
        metrics_file=folder.metrics_file,
        log_dir=settings.run.log_dir,
        run_name=settings.run.run_name,
        settings=settings.model_dump(mode="json"),
        resumed_step=start.state.step if start.is_resumed else None,
        warn=progress.warn,
    )
    try:
        yield logger
    finally:
        logger.close()


def announce(
    settings: TrainSettings, inputs: Inputs, trainer: Trainer, start: Start, progress: Progress
) -> None:
    """Print a summary of the run that is about to start."""
    samples, ranks = inputs.samples, trainer.ranks
    if start.checkpoint is not None:
        progress.info(
            f"Resuming from `{start.checkpoint.folder}`, step {start.state.step:,} of "
            f"{trainer.total_steps:,}"
        )
    num_gpus = torch.cuda.device_count() if ranks.device.type == "cuda" else 0
    if ranks.num_ranks == 1 and num_gpus > 1:
        progress.warn(
            f"Only one of {num_gpus} visible GPUs is used",
            hint=f"Pass `--nproc-per-node {num_gpus}` to use all of them, "
            "or set `CUDA_VISIBLE_DEVICES` to choose one",
        )
    progress.info(
        f"Training {settings.draft.algorithm} for `{settings.draft.verifier_name_or_path}`: "
        f"{len(samples):,} samples, {samples.num_tokens:,} tokens "
        f"({samples.num_supervised_tokens:,} supervised), {ranks.num_ranks} "
        f"{'rank' if ranks.num_ranks == 1 else 'ranks'} on {ranks.device.type}, "
        f"{trainer.total_steps:,} steps"
    )
    if inputs.is_live:
        progress.info(f"The verifier computes hidden states of layers {inputs.layer_ids}")


@contextmanager
def out_of_memory_explained(
    total_seq_len: int, *, has_whole_verifier: bool = False
) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into one with a hint.

    Args:
        total_seq_len: Tokens per packed sequence.
        has_whole_verifier: Whether the GPU has the whole verifier in memory, or its share of it.
    """
    tokens = f"{total_seq_len:,} tokens per packed sequence"
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_gpu = isinstance(error, torch.cuda.OutOfMemoryError) or _tells(error, NO_ROOM_ON_GPU)
        if is_gpu:
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            raise MachineError(
                f"The GPU is out of memory: {tokens}, peak {format_bytes(peak)}",
                hint="Lower `--total-seq-len`, or shard the verifier across GPUs with "
                "`--shard-verifier`"
                if has_whole_verifier
                else "Lower `--total-seq-len`, or shard across more GPUs with `--nproc-per-node`",
            ) from None
        if not isinstance(error, MemoryError) and not _tells(error, NO_ROOM):
            raise
        raise MachineError(
            f"The machine is out of memory: {tokens}", hint="Lower `--total-seq-len`"
        ) from None


def _tells(error: Exception, texts: tuple[str, ...]) -> bool:
    return any(text in str(error) for text in texts)


def make_report(
    settings: TrainSettings,
    trainer: Trainer,
    start: Start,
    layer_ids: LayerIds,
    *,
    duration_seconds: float,
    was_already_finished: bool,
    is_dry_run: bool,
) -> TrainReport:
    """The result of the run; all ranks must call."""
    state = trainer.state
    best = state.best or {}
    is_cuda = trainer.ranks.device.type == "cuda"
    peak = int(trainer.ranks.max(torch.cuda.max_memory_allocated() if is_cuda else 0))
    folder = trainer.saver.folder
    return TrainReport(
        checkpoint=folder.latest.folder if folder and folder.latest else None,
        best_checkpoint=settings.run.save_path / best["name"] if "name" in best else None,
        best_epoch=int(best["name"]) if "name" in best else None,
        step=state.step,
        total_steps=trainer.total_steps,
        epochs=settings.run.epochs,
        duration_seconds=duration_seconds,
        start_up_seconds=trainer.log.start_up.seconds,
        save_wait_seconds=trainer.saver.waited_seconds,
        tokens_per_second=trainer.log.tokens_per_second,
        capture_share=trainer.log.capture_share,
        peak_memory_bytes=peak if is_cuda else None,
        validation_loss=state.metrics.get("loss"),
        best_validation_loss=best.get("loss"),
        acceptance_length=state.metrics.get("acceptance_length"),
        evaluated_acceptance_length=state.metrics.get(EVALUATED),
        best_evaluated_acceptance_length=best.get(EVALUATED),
        acceptance_rates=tuple(
            state.metrics[f"acceptance_rate_{step}"]
            for step in range(len(trainer.draft.loss_weights))
            if f"acceptance_rate_{step}" in state.metrics
        ),
        target_layer_ids=layer_ids.ids,
        are_layer_ids_assumed=layer_ids.is_assumed,
        num_skipped_steps=int(trainer.optimizer.num_skipped),
        num_bad_samples=len(trainer.log.samples.bad) + trainer.log.num_broken_samples,
        is_resumed=start.is_resumed,
        is_stopped_early=trainer.is_stopped_early,
        was_already_finished=was_already_finished,
        is_dry_run=is_dry_run,
    )
