"""What `speculators evaluate` writes for a serving engine."""

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from speculators_cli.cli.output import Output, format_duration

if TYPE_CHECKING:
    from speculators_cli.core.evaluation.served_report import ServedReport, Throughput


def show_served(report: "ServedReport", output: Output) -> None:
    """Write the tables, then the summary."""
    pairs = zip(report.acceptance_rates, report.conditional_acceptance_rates, strict=True)
    output.table(
        ("position", "acceptance rate", "after accepted tokens"),
        [
            (str(k), f"{rate:.2f}", "-" if given is None else f"{given:.2f}")
            for k, (rate, given) in enumerate(pairs, start=1)
        ],
    )
    output.table(
        ("requests at a time", "tokens/s", "without the draft", "speedup"),
        [_throughput(x) for x in report.throughputs],
    )
    output.panel("Evaluated", list(_rows(report)))


def _throughput(found: "Throughput") -> tuple[str, str, str, str]:
    alone, spread = found.without_draft, found.speedup_range
    speedup = "-"
    if spread is not None:
        speedup = f"{found.speedup:.2f}x ({spread[0]:.2f} to {spread[1]:.2f})"
    return (
        f"{found.concurrency:,}",
        f"{median(found.with_draft):,.0f}",
        "-" if alone is None else f"{median(alone):,.0f}",
        speedup,
    )


def _rows(report: "ServedReport") -> Iterator[tuple[str, str]]:
    counted = report.counted
    yield "draft", report.draft
    versions = ", ".join(
        f"{key} {value}" for key, value in report.engine.items() if value and key != "engine"
    )
    yield "verifier", report.verifier
    yield "engine", versions
    bad = f", {report.num_bad_rows:,} rows left out" if report.num_bad_rows else ""
    yield "prompts", f"{report.prompts}, {len(counted.answers):,} answered{bad}"
    yield (
        "acceptance length",
        f"{report.acceptance_length:.2f} over {counted.num_passes:,} verifier passes of "
        f"{len(counted.num_accepted)} draft tokens",
    )
    yield "interval", "none: the engine has no counts by prompt"
    if report.num_different is not None:
        yield (
            "output identical to that without the draft",
            "yes"
            if report.num_different == 0
            else f"no, {report.num_different:,} of {len(counted.answers):,} answers differ",
        )
    if not report.is_long_enough:
        yield "below the minimum", f"`--min-acceptance-length` is {report.min_acceptance_length:g}"
    yield "time", format_duration(report.duration_seconds)
