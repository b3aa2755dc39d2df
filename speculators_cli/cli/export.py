"""`speculators export`."""

from typing import TYPE_CHECKING

from speculators_cli.cli.imports import importing
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output
from speculators_cli.settings.export import ExportSettings

if TYPE_CHECKING:
    from speculators_cli.core.export.export import ExportReport

EXAMPLES = (
    "speculators export checkpoints --output-dir served",
    "speculators export checkpoints/checkpoint_best --target sglang --output-dir served",
    "speculators export checkpoints --output-dir served --dtype float16 --overwrite",
)


@with_settings(ExportSettings, examples=EXAMPLES)
def export(*, settings: ExportSettings, output: Output) -> None:
    """Export a draft, and report how it was checked."""
    with importing():
        from speculators_cli.core.export import export as core

    report = core.export(settings, progress=output)
    if output.is_json:
        output.result("export", report.to_json())
    else:
        show(report, output)
    if report.serve_command is not None:
        output.hint(report.serve_command)


def show(report: "ExportReport", output: Output) -> None:
    """Write what was exported, and how it was checked."""
    embedding = "" if report.has_embedding else ", embedding shared from the verifier"
    output.line(
        f"Exported `{report.source}` to `{report.output_dir}` for {report.target}: "
        f"{report.num_parameters / 1e6:,.1f}M parameters, {report.dtype}, "
        f"{report.num_bytes / 2**20:,.1f} MiB{embedding}"
    )
    if report.verification is None:
        output.line("Not verified")
    else:
        output.line(
            f"Verified: names, shapes and values match; relative logit error "
            f"{report.verification.logit_error:.1e}, top-1 agreement "
            f"{report.verification.argmax_agreement:.0%}"
        )
    if report.is_verifier_checked:
        output.line(f"Matches verifier `{report.verifier}`")
    if report.advice is not None:
        output.line(report.advice.sentence)
    if report.pushed_to is not None:
        output.line(f"Uploaded to `{report.pushed_to}`")
