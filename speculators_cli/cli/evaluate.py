"""`speculators evaluate`."""

import typer

from speculators_cli.cli.evaluation_tables import show, show_simulated
from speculators_cli.cli.imports import importing
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output
from speculators_cli.cli.served_tables import show_served
from speculators_cli.settings.evaluate import EvaluateSettings

EXAMPLES = (
    "speculators evaluate checkpoints --prompts mt_bench.jsonl --num-speculative-tokens 3",
    "speculators evaluate served --prompts gsm8k --engine vllm --concurrency 1,8,32",
    "speculators evaluate checkpoints --against other-draft --prompts gsm8k",
)


@with_settings(EvaluateSettings, examples=EXAMPLES)
def evaluate(*, settings: EvaluateSettings, output: Output) -> None:
    """Evaluate a draft, and report what it reached."""
    with importing():
        from speculators_cli.core.evaluation import evaluate as core
        from speculators_cli.core.evaluation.report import EvaluationReport
        from speculators_cli.core.evaluation.served import evaluate_served
        from speculators_cli.core.evaluation.served_report import ServedReport
        from speculators_cli.core.evaluation.simulation import simulate

    if settings.simulation.simulate is not None:
        simulated = simulate(settings, progress=output)
        if output.is_json:
            output.result("evaluate", simulated.to_json())
        else:
            show_simulated(simulated, output)
        return
    report: EvaluationReport | ServedReport
    if settings.engine.is_served:
        report = evaluate_served(settings, progress=output)
    else:
        report = core.evaluate(settings, progress=output)
    if output.is_json:
        output.result("evaluate", report.to_json())
    elif isinstance(report, ServedReport):
        show_served(report, output)
    else:
        show(report, output)
    if not report.is_long_enough:
        raise typer.Exit(1)
