"""`speculators inspect-data`."""

from typing import TYPE_CHECKING

import typer

from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_duration
from speculators_cli.core.files import format_bytes
from speculators_cli.settings.inspect_data import InspectDataSettings

if TYPE_CHECKING:
    from speculators_cli.core.preparation.inspection_report import (
        Distribution,
        InspectionReport,
    )

BARS = "▁▂▃▄▅▆▇█"
MAX_NAMED = 50
EXAMPLES = (
    "speculators inspect-data data",
    "speculators inspect-data data --verifier-name-or-path Qwen/Qwen3-8B --verify",
    "speculators inspect-data data --json",
)


@with_settings(InspectDataSettings, examples=EXAMPLES)
def inspect_data(*, settings: InspectDataSettings, output: Output) -> None:
    """Describe samples and list their problems."""
    from speculators_cli.core.preparation import inspection
    from speculators_cli.core.preparation.text import read_text

    if settings.inspect.show is not None:
        output.marked(read_text(settings.inspect))
        return
    report = inspection.inspect_data(settings, progress=output)
    if output.is_json:
        output.result("inspect-data", report.to_json())
    else:
        show(report, str(settings.inspect.data_path), output)
    if report.problems:
        output.hint("Capture these samples again, or delete the files")
        raise typer.Exit(1)


def show(report: "InspectionReport", name: str, output: Output) -> None:
    """Write the description, then the problems."""
    assumed = ", assumed" if report.are_layer_ids_assumed else ""
    ids = f" ({', '.join(map(str, report.layer_ids))}{assumed})" if report.layer_ids else ""
    verifier = f", from `{report.verifier}`" if report.verifier else ""
    output.line(
        f"{name}: {report.num_samples:,} samples, format {report.format}, {report.num_aux_layers} "
        f"aux layers{ids}, hidden size {report.hidden_size:,}, {', '.join(report.dtypes)}, "
        f"{format_bytes(report.num_bytes)}{verifier}"
    )
    output.table(
        ("", "min", "median", "p95", "max", "total", "distribution"),
        [row("tokens", report.tokens), row("supervised tokens", report.supervised_tokens)],
    )
    output.line(
        f"Packed at {report.total_seq_len:,} tokens: {report.num_packed_sequences:,} sequences, "
        f"{report.fill:.1%} filled"
    )
    output.line(
        f"An epoch at {report.tokens_per_second:,.0f} tokens/s: "
        f"{format_duration(report.epoch_seconds)}, "
        f"{format_bytes(int(report.disk_bytes_per_second))}/s from disk"
    )
    if report.layer_rms:
        scales = "  ".join(f"{rms:.3g}" for rms in report.layer_rms)
        output.line(
            f"Root mean square of each layer, last hidden states last: {scales} "
            f"({report.num_samples_looked_at:,} samples)"
        )
    if report.agreement is not None:
        output.line(
            f"LM-head top-1 accuracy: {report.agreement.with_norm:.1%} with the final norm, "
            f"{report.agreement.without_norm:.1%} without, of "
            f"{report.agreement.num_positions:,} positions"
        )
    if not report.problems:
        output.line("No problems found")
        return
    noun = "problem" if len(report.problems) == 1 else "problems"
    output.line(f"Found {len(report.problems):,} {noun}")
    for problem in report.problems[:MAX_NAMED]:
        output.line(f"  {problem.file}  {problem.problem}")
    if len(report.problems) > MAX_NAMED:
        output.line(f"  and {len(report.problems) - MAX_NAMED:,} more: `--json` lists all")


def row(name: str, counts: "Distribution") -> tuple[str, ...]:
    """One line of the table, with a histogram at its end."""
    most = max(counts.histogram)
    bars = "".join(BARS[round(n / most * (len(BARS) - 1))] if n else " " for n in counts.histogram)
    numbers = (counts.min, counts.median, counts.p95, counts.max, counts.total)
    return (name, *(f"{number:,.0f}" for number in numbers), bars)
