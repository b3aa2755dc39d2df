"""`speculators generate-data`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from speculators_cli.cli.flags import NPROC_PER_NODE, Flag
from speculators_cli.cli.imports import importing
from speculators_cli.cli.launch import launch
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_duration, format_speed
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import format_bytes
from speculators_cli.settings.generate_data import GenerateDataSettings

if TYPE_CHECKING:
    from speculators_cli.core.capture.estimate import Estimate
    from speculators_cli.core.capture.report import GenerationReport, StageTime

MAX_LISTED = 10
EXAMPLES = (
    "speculators generate-data prompts.jsonl --verifier-name-or-path Qwen/Qwen3-8B --regenerate",
    "speculators generate-data chats.jsonl --verifier-name-or-path Qwen/Qwen3-8B --dry-run",
    "speculators generate-data chats.jsonl --verifier-name-or-path Qwen/Qwen3-8B --show-masks 3",
)
DRY_RUN = Flag(
    "dry_run",
    ("--dry-run",),
    "Print time, memory and disk estimates, then exit",
    "Input",
    kind=bool,
)


@with_settings(GenerateDataSettings, DRY_RUN, NPROC_PER_NODE, examples=EXAMPLES)
def generate_data(
    context: typer.Context,
    *,
    settings: GenerateDataSettings,
    output: Output,
    dry_run: bool,
    nproc_per_node: int | None,
) -> None:
    """Generate here or in processes of its own, or only print what would be generated."""
    if dry_run:
        with importing():
            from speculators_cli.core.capture.estimate import estimate
        show_estimate(estimate(settings, num_ranks=nproc_per_node or 1), output)
        return
    if settings.tokens.show_masks is not None:
        show_masks(settings, settings.tokens.show_masks, output)
        return
    if nproc_per_node is not None and nproc_per_node > 1:
        launch(nproc_per_node, context.obj)
        return
    with importing():
        from speculators_cli.core.capture import generate
    report = generate.generate_data(settings, progress=output)
    if report is None:
        return
    if output.is_json:
        output.result("generate-data", report.to_json())
    else:
        show(report, output)


def show(report: "GenerationReport", output: Output) -> None:
    """Write the panel, what was left out, and what to run next."""
    output.panel("Generated", list(_rows(report)))
    for row in report.bad_rows[:MAX_LISTED]:
        output.line(f"  {row}")
    if report.num_bad_rows > MAX_LISTED:
        output.line(f"  and {report.num_bad_rows - MAX_LISTED:,} more: `--json` lists them")
    if report.num_rows == 0:
        return
    output.hint(_next_step(report))


def show_masks(settings: GenerateDataSettings, number: int, output: Output) -> None:
    """Write rows with their supervised part marked."""
    with importing():
        from speculators_cli.core.capture.generate import read_masked_rows
    rows = read_masked_rows(settings, number)
    if output.is_json:
        content = [{"name": row.name, "spans": row.spans} for row in rows]
        output.result("generate-data", {"rows": content})
        return
    for row in rows:
        output.line(f"{row.name}:")
        output.marked(row.spans)
        output.line()


def show_estimate(estimate: "Estimate", output: Output) -> None:
    """Write what a run would take; end with 5 if it cannot fit."""
    if output.is_json:
        output.result("generate-data", estimate.to_json())
    else:
        output.panel("Estimate", list(_rows_of_estimate(estimate)))
    if estimate.problems:
        raise MachineError(
            f"The run does not fit: {', and '.join(estimate.problems)}",
            hint="Pass another `--output-dir`, `--storage-dtype float8`, `--tokens-only`, or "
            "`--device-map auto`",
        )


def _rows_of_estimate(estimate: "Estimate") -> Iterator[tuple[str, str]]:
    most = "at most " if estimate.is_upper_bound else ""
    yield "input", f"{estimate.num_conversations:,} rows"
    yield (
        "tokens",
        f"{most}{estimate.num_tokens:,} in {estimate.num_rows:,} rows, "
        f"{estimate.num_supervised_tokens:,} supervised",
    )
    size, free = format_bytes(estimate.num_bytes), format_bytes(estimate.free_bytes)
    per_token = f"{estimate.bytes_per_token:,.0f} bytes per token"
    yield "disk", f"{most}{size} of {free} free, {per_token}"
    if estimate.memory_bytes is not None and estimate.device_memory_bytes is not None:
        yield (
            "memory",
            (
                f"{format_bytes(estimate.memory_bytes)} of "
                f"{format_bytes(estimate.device_memory_bytes)} per GPU"
            ),
        )
    if estimate.capture_seconds is not None and estimate.capture_tokens_per_second is not None:
        yield (
            "capture",
            (
                f"{most}{format_duration(estimate.capture_seconds)} at "
                f"{format_speed(estimate.capture_tokens_per_second)} per rank"
            ),
        )


def _rows(report: "GenerationReport") -> Iterator[tuple[str, str]]:
    bad = f", {report.num_bad_rows:,} of them unreadable" if report.num_bad_rows else ""
    yield "input", f"{report.num_conversations:,} rows{bad}"
    yield (
        "tokens",
        f"{report.num_tokens:,} in {report.num_rows:,} rows, {report.supervised_share:.1%} of them "
        "supervised",
    )
    if report.num_truncated_answers:
        yield "answers without an end token", f"{report.num_truncated_answers:,}"
    if report.num_truncated_rows:
        yield "rows truncated at the maximum length", f"{report.num_truncated_rows:,}"
    for reason, number in report.left_out.items():
        yield "left out", f"{number:,}: {reason}"
    if report.num_samples is not None:
        ids = ", ".join(map(str, report.layer_ids))
        yield "samples", f"{report.num_samples:,}, aux layers {ids}"
    if report.num_non_finite:
        yield "left out", f"{report.num_non_finite:,}: hidden states that are not finite"
    if report.head_agreement is not None:
        yield "LM head over captured states", f"{report.head_agreement:.1%} the verifier's tokens"
    yield "size", f"{format_bytes(report.num_bytes)} in `{report.output_dir}`"
    yield (
        "time",
        "  ".join((_time("tokens", report.tokens_time), _time("states", report.states_time))),
    )


def _time(name: str, time: "StageTime") -> str:
    speed = time.tokens_per_second
    rate = f" ({format_speed(speed)})" if speed is not None else ""
    return f"{name} {format_duration(time.seconds)}{rate}"


def _next_step(report: "GenerationReport") -> str:
    verifier, folder = report.verifier, report.output_dir
    if report.num_samples is None:
        return (
            f"Run `speculators train --verifier-name-or-path {verifier} --data-path {folder} "
            "--capture online`, or this command again without `--tokens-only`"
        )
    return (
        f"Run `speculators build-vocab-map --data-path {folder} --verifier-name-or-path "
        f"{verifier}`, then `speculators train --verifier-name-or-path {verifier} --data-path "
        f"{folder}`"
    )
