"""`speculators train`."""

import os
from typing import Any

import typer

from speculators_cli.cli.flags import NPROC_PER_NODE, Flag
from speculators_cli.cli.imports import importing
from speculators_cli.cli.launch import launch
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_duration, format_speed
from speculators_cli.core.files import format_bytes
from speculators_cli.core.place import is_first_rank
from speculators_cli.settings.train import TrainSettings

EXAMPLES = (
    "speculators train --verifier-name-or-path Qwen/Qwen3-8B --data-path data --plan",
    "speculators train --verifier-name-or-path Qwen/Qwen3-8B --data-path data --nproc-per-node 8",
    "speculators train --config run.toml --lr 3e-5",
)
RUN_FLAGS = (
    Flag(
        "dry_run", ("--dry-run",), "Build everything, run one step, write nothing", "Run", kind=bool
    ),
    Flag(
        "plan",
        ("--plan",),
        "Print time, memory and disk estimates, then exit",
        "Run",
        kind=bool,
    ),
    NPROC_PER_NODE,
)


@with_settings(TrainSettings, *RUN_FLAGS, examples=EXAMPLES)
def train(
    context: typer.Context,
    *,
    settings: TrainSettings,
    output: Output,
    nproc_per_node: int | None,
    dry_run: bool,
    plan: bool,
) -> None:
    """Train here or in processes of its own, or print the plan."""
    if plan:
        from speculators_cli.cli.train_plan import show_plan

        show_plan(settings, output, num_ranks=nproc_per_node)
        return
    if nproc_per_node is not None and nproc_per_node > 1:
        launch(nproc_per_node, context.obj)
        return
    # Read when torch is imported: where a rank is lost, the others' messages are those that count.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with importing():
        import torch

        from speculators_cli.core import evaluated_training
        from speculators_cli.core.training.report import TrainReport
        from speculators_cli.core.training.start_up import (
            StartUp,
            count_process_seconds,
            find_import_hint,
        )

    start_up = StartUp(count_process_seconds())
    import_hint = find_import_hint(torch)
    if import_hint is not None and is_first_rank():
        output.hint(import_hint)
    try:
        if settings.data.conversations is not None and not dry_run:
            settings = write_tokens(settings, output)
            start_up.end("tokens")
        report: TrainReport = evaluated_training.train(
            settings, progress=output, dry_run=dry_run, start_up=start_up
        )
    finally:
        output.close()
    if not is_first_rank():
        return
    if output.is_json:
        output.result("train", report.to_json())
    else:
        output.panel("Dry run" if dry_run else "Trained", _rows(report))
    if report.was_already_finished:
        flag = "--early-stopping-patience" if report.is_stopped_early else "--epochs"
        output.hint(f"Raise `{flag}` to train further: the run was already finished")


def write_tokens(settings: TrainSettings, output: Output) -> TrainSettings:
    """Write tokens and vocabulary of conversations, once the save path is known to be free."""
    from speculators_cli.core.capture.training_tokens import write_training_tokens
    from speculators_cli.core.preparation.training_vocabulary import write_training_vocabulary
    from speculators_cli.core.progress import SILENT
    from speculators_cli.core.training.run import check_place

    progress = output if is_first_rank() else SILENT
    if is_first_rank():
        check_place(settings)
    settings = write_training_tokens(settings, progress=progress)
    if settings.draft.draft_vocab_size is None:
        return settings
    return write_training_vocabulary(settings, progress=progress)


def _rows(report: Any) -> list[tuple[str, str]]:
    rows = []
    if report.is_dry_run:
        rows.append(("steps", f"{report.step:,} of {report.total_steps:,}, nothing written"))
    if report.checkpoint is not None:
        best = f" (best: {report.best_epoch})" if report.best_epoch is not None else ""
        rows.append(("checkpoint", f"{report.checkpoint}{best}"))
    peak = report.peak_memory_bytes
    memory = f", peak {format_bytes(peak)} per GPU" if peak else ""
    speed = format_speed(report.tokens_per_second)
    rows.append(("time", f"{format_duration(report.duration_seconds)}  ({speed}{memory})"))
    if report.capture_share is not None:
        rows.append(("capture", f"{report.capture_share:.0%} of the time of steps"))
    if report.validation_loss is not None:
        loss = f"{report.validation_loss:.3f} nats, weighted sum over predictions"
        if report.best_validation_loss is not None:
            loss += f", {report.best_validation_loss:.3f} in the best epoch {report.best_epoch}"
        rows.append(("validation loss", loss))
    if report.acceptance_length is not None:
        rates = "  ".join(f"{rate:.2f}" for rate in report.acceptance_rates)
        length = f"{report.acceptance_length:.2f}  ({rates} at each position)"
        rows.append(("simulated acceptance length", length))
    rows += _evaluated_rows(report)
    if report.num_skipped_steps:
        rows.append(("skipped steps", f"{report.num_skipped_steps:,}"))
    return rows


def _evaluated_rows(report: Any) -> list[tuple[str, str]]:
    if report.evaluated_acceptance_length is None:
        return []
    length = f"{report.evaluated_acceptance_length:.2f}"
    if report.best_evaluated_acceptance_length is not None:
        best = report.best_evaluated_acceptance_length
        length += f", {best:.2f} in the best epoch {report.best_epoch}"
    return [("evaluated acceptance length", length)]
