"""`speculators convert-v0`."""

from typing import TYPE_CHECKING

import typer

from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_duration
from speculators_cli.core.files import format_bytes
from speculators_cli.settings.convert_v0 import ConvertV0Settings

if TYPE_CHECKING:
    from speculators_cli.core.preparation.conversion import ConversionReport

MAX_NAMED = 20
EXAMPLES = (
    "speculators convert-v0 v0_data --output-dir data --dry-run",
    "speculators convert-v0 v0_data --output-dir data --workers 8",
    "speculators convert-v0 v0_data --output-dir data --target-layer-ids 2,18,33",
)


@with_settings(ConvertV0Settings, examples=EXAMPLES)
def convert_v0(*, settings: ConvertV0Settings, output: Output) -> None:
    """Convert samples, and list those that cannot be."""
    from speculators_cli.core.preparation import conversion

    report = conversion.convert_v0(settings, progress=output)
    if output.is_json:
        output.result("convert-v0", report.to_json())
    else:
        show(report, str(settings.files.output_dir), output)
    if report.problems:
        raise typer.Exit(1)


def show(report: "ConversionReport", output_dir: str, output: Output) -> None:
    """Write what was converted, and what could not be."""
    size = format_bytes(report.num_bytes)
    if report.is_dry_run:
        rate = f"{size}; nothing written"
    else:
        seconds = report.duration_seconds
        speed = format_bytes(int(report.num_bytes / seconds))
        rate = f"{size} in {format_duration(seconds)}, {speed}/s"
    verb = "Would convert" if report.is_dry_run else "Converted"
    is_kept = report.last_hidden_states_are_normed
    states = "marked as normed" if is_kept else "from before the final norm"
    output.line(
        f"{verb} {report.num_converted:,} of {report.num_files:,} samples to `{output_dir}` "
        f"({rate}); last hidden states {states}"
    )
    if report.num_already_converted:
        output.line(f"{report.num_already_converted:,} were already converted")
    if report.num_sources_removed:
        output.line(f"Removed {report.num_sources_removed:,} v0 files")
    if report.largest_round_trip_error is not None:
        error = report.largest_round_trip_error
        output.line(f"Round-trip error of the final norm: {error:.1e} of a token's largest value")
    output.line(describe_layer_ids(report))
    for problem in report.problems[:MAX_NAMED]:
        output.line(f"  `{problem.file}` {problem.problem}")
    if len(report.problems) > MAX_NAMED:
        output.line(f"  and {len(report.problems) - MAX_NAMED:,} more")
    if report.problems:
        output.line(f"Could not convert {len(report.problems):,} files")


def describe_layer_ids(report: "ConversionReport") -> str:
    """The line on the verifier layers of the samples."""
    if report.layer_ids is None:
        return "Layer ids unknown: `speculators train` assumes them, with a warning"
    assumed = " (assumed)" if report.are_layer_ids_assumed else ""
    return f"Layer ids {','.join(map(str, report.layer_ids))}{assumed}"
