"""`speculators demo`."""

from typing import TYPE_CHECKING

from speculators_cli.cli.imports import importing
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_duration
from speculators_cli.settings.demo import DemoSettings

if TYPE_CHECKING:
    from speculators_cli.core.demo.demo import DemoReport

EXAMPLES = (
    "speculators demo",
    "speculators demo --algorithm dflash",
    "speculators demo --output-dir /tmp/demo --seed 1",
)


@with_settings(DemoSettings, examples=EXAMPLES)
def demo(*, settings: DemoSettings, output: Output) -> None:
    """Capture, train and evaluate with the embedded verifier."""
    with importing():
        from speculators_cli.core.demo.demo import check_report, run_demo

    try:
        report = run_demo(settings, progress=output)
    finally:
        output.close()
    if output.is_json:
        output.result("demo", report.to_json())
    else:
        show(report, output)
    check_report(report)


def show(report: "DemoReport", output: Output) -> None:
    """Write what the demo found, and how to do the same with data of one's own."""
    before, after = report.untrained, report.trained
    output.line()
    output.line("Acceptance rate of each draft token, on held-out prompts:")
    pairs = zip(before.acceptance_rates, after.acceptance_rates, strict=True)
    rates = [(str(k), f"{old:.2f}", f"{new:.2f}") for k, (old, new) in enumerate(pairs, 1)]
    output.table(("position", "before training", "after training"), rates)
    output.line("One answer, with the accepted draft tokens in «»:")
    output.line()
    output.marked([(report.sample_prompt, False), *report.sample])
    output.line()
    answer = "yes" if report.is_lossless else "no"
    output.line(f"Output identical to the verifier's own greedy output: {answer}")
    num_drafted = after.num_passes * after.num_draft_tokens
    rows = [
        (
            "acceptance length",
            f"{after.acceptance_length:.2f} tokens per verifier pass, "
            f"{before.acceptance_length:.2f} before training",
        ),
        ("tokens drafted", f"{num_drafted:,}, {sum(after.num_accepted):,} of them accepted"),
        ("checkpoint", str(report.training.best_checkpoint)),
        ("time", format_duration(report.duration_seconds)),
    ]
    output.panel("Demo", rows)
    settings_file = report.output_dir / "checkpoints" / "settings.json"
    output.line("Repeat stage 3, then run stages 2 and 3 for a verifier of your own:")
    output.line(f"  speculators train --config {settings_file} --save-path again")
    output.line("  speculators build-vocab-map --verifier-name-or-path ID --data-path SAMPLES")
    command = f"speculators train --algorithm {report.algorithm}"
    output.line(f"  {command} --verifier-name-or-path ID --data-path SAMPLES")
