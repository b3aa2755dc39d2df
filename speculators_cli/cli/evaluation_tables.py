"""What `speculators evaluate` writes: tables, then a summary."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from speculators_cli.cli.output import Output, format_duration
from speculators_cli.core.files import format_bytes

if TYPE_CHECKING:
    from speculators_cli.core.evaluation.diagnosis import Diagnosis
    from speculators_cli.core.evaluation.intervals import Interval
    from speculators_cli.core.evaluation.report import Comparison, EvaluationReport
    from speculators_cli.core.evaluation.simulation import SimulationReport


def show_simulated(report: "SimulationReport", output: Output) -> None:
    """Write the table of an estimate."""
    output.table(
        ("position", "simulated acceptance rate"),
        [(str(k), f"{rate:.2f}") for k, rate in enumerate(report.acceptance_rates, start=1)],
    )
    output.line(
        f"Simulated acceptance length {report.acceptance_length:.2f} over "
        f"{report.num_chains[0]:,} supervised tokens of {report.num_samples:,} samples, with "
        "teacher forcing; `--prompts` measures the real one"
    )


def show(report: "EvaluationReport", output: Output) -> None:
    """Write the tables, then the summary."""
    found = report.measured
    pairs = zip(found.acceptance_rates, found.conditional_acceptance_rates, strict=True)
    output.table(
        ("position", "acceptance rate", "after accepted tokens", "predicted speedup"),
        [
            (str(k), f"{rate:.2f}", "-" if given is None else f"{given:.2f}", f"{speedup:.2f}x")
            for k, ((rate, given), speedup) in enumerate(
                zip(pairs, report.speedups.predicted, strict=True), start=1
            )
        ],
    )
    if len(report.categories) > 1:
        output.table(
            ("category", "prompts", "passes", "acceptance length"),
            [
                (x.name, f"{x.num_prompts:,}", f"{x.num_passes:,}", f"{x.acceptance_length:.2f}")
                for x in report.categories
            ],
        )
    if len(report.context_lengths) > 1:
        output.table(
            ("context length", "passes", "acceptance length"),
            [
                (
                    f"{x.min_tokens:,}-{x.max_tokens - 1:,}"
                    if x.max_tokens
                    else f"{x.min_tokens:,}+",
                    f"{x.num_passes:,}",
                    f"{x.acceptance_length:.2f}",
                )
                for x in report.context_lengths
            ],
        )
    if report.diagnosis is not None:
        show_diagnosis(report.diagnosis, output)
    output.panel("Evaluated", list(_rows(report)))


def show_diagnosis(diagnosis: "Diagnosis", output: Output) -> None:
    """Write what was changed, and what it gained."""
    output.table(
        ("change", "may be wrong", "acceptance length", "gain"),
        [
            (
                x.change,
                x.name,
                f"{x.acceptance_length:.2f}",
                f"{x.gain:+.2f}{_interval(x.interval)}",
            )
            for x in diagnosis.causes
        ],
    )
    simulated = ""
    if diagnosis.simulated is not None:
        simulated = f"; simulated in training {diagnosis.simulated:.2f}"
    output.line(
        f"Before any change {diagnosis.acceptance_length:.2f}, after every token of the answers"
        f"{simulated}"
    )
    if diagnosis.found:
        first = diagnosis.found[0]
        output.line(f"Largest gain: {first.name} ({first.change})")
    else:
        output.line("No change gains beyond chance")


def _rows(report: "EvaluationReport") -> Iterator[tuple[str, str]]:
    found = report.measured
    yield "draft", report.draft
    yield "verifier", f"{report.verifier}, {report.dtype} on {report.device}"
    bad = f", {report.num_bad_rows:,} rows left out" if report.num_bad_rows else ""
    yield "prompts", f"{report.prompts}, {len(found.answers):,} answered{bad}"
    yield (
        "acceptance length",
        f"{found.acceptance_length:.2f}{_interval(report.interval)} over {found.num_passes:,} "
        f"verifier passes of {found.num_draft_tokens} draft tokens",
    )
    yield "output identical to the verifier's own", _lossless(report)
    if report.refused_outside_vocab is not None:
        yield (
            "rejections outside the draft vocabulary",
            f"{report.refused_outside_vocab:.1%} of the rejected tokens",
        )
    speedups = report.speedups
    yield (
        "predicted speedup",
        f"{speedups.predicted[speedups.best - 1]:.2f}x with {speedups.best} draft tokens, for one "
        "request at a time in this engine",
    )
    times, num_passes = found.times, max(found.times.num_passes, 1)
    yield (
        "time per pass",
        f"draft {times.draft_seconds / num_passes * 1e3:,.1f} ms, verifier "
        f"{times.verify_seconds / num_passes * 1e3:,.1f} ms, up to {report.batch_size} prompts",
    )
    if report.peak_memory_bytes is not None:
        yield "peak memory", format_bytes(report.peak_memory_bytes)
    if report.against is not None:
        yield "compared with", _comparison(report.against)
    if not report.is_long_enough:
        yield "below the minimum", f"`--min-acceptance-length` is {report.min_acceptance_length:g}"
    yield "time", format_duration(report.duration_seconds)


def _interval(interval: "Interval | None") -> str:
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"


def _lossless(report: "EvaluationReport") -> str:
    found = report.measured
    if found.is_lossless:
        return "yes"
    ties = "" if report.dtype == "float32" else f"; near-ties differ in {report.dtype}"
    return f"no, {found.num_different:,} of {len(found.answers):,} answers differ{ties}"


def _comparison(other: "Comparison") -> str:
    verdict = {
        "longer": "the difference is real",
        "shorter": "the difference is real",
        "undecided": "no difference beyond chance",
    }[other.verdict]
    return (
        f"{other.draft}: {other.acceptance_length:.2f}, difference {other.difference:+.2f}"
        f"{_interval(other.interval)}: {verdict}"
    )
