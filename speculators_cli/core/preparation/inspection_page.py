"""The report of an inspection as one self-contained HTML file with plots."""

from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path

from speculators_cli.core.escaping import escape_line
from speculators_cli.core.files import format_bytes, replacing
from speculators_cli.core.preparation.inspection_report import Distribution, InspectionReport

WIDTH, HEIGHT, MARGIN = 520, 200, 28  # of a plot, in pixels
MAX_BARS = 12  # more labels would overlap
MAX_NAMED = 200
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4em; } h2 { font-size: 1em; margin: 0 0 .4em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 2em; }
table { border-collapse: collapse; } td, th { padding: .2em 1em .2em 0; text-align: left; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #555; }
figure { margin: 0; } rect { fill: #2b6cb0; } code { font-size: .9em; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616; }
  svg text { fill: #aaa; } rect { fill: #63a4e8; } }
"""


def write_page(report: InspectionReport, file: Path, *, name: str) -> None:
    """Write the page atomically; `name` is that of the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(build_page(report, name), "utf-8")


def build_page(report: InspectionReport, name: str) -> str:
    """Build the page, which has no external resources."""
    coverage = list(report.coverage_by_size.items())[-MAX_BARS:]
    plots = [
        plot("Tokens per sample", *bins(report.tokens), "samples"),
        plot("Supervised tokens per sample", *bins(report.supervised_tokens), "samples"),
        plot(
            "Fraction of supervised tokens",
            [f"{10 * i}%" for i in range(10)],
            report.supervised_fractions,
            "samples",
        ),
        plot(
            "Supervised tokens covered by the most frequent token ids",
            [f"{size:,}" for size, _ in coverage],
            [100 * share for _, share in coverage],
            "%",
        ),
    ]
    if report.layer_rms:
        labels = [f"aux {i}" for i in range(report.num_aux_layers)] + ["last"]
        plots.append(plot("Scale of each layer", labels, report.layer_rms, "root mean square"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(name)}</h1>
{table(facts(report))}
<div class="plots">
{"".join(plots)}
</div>
{problems(report)}
</body>
</html>
"""


def facts(report: InspectionReport) -> list[tuple[str, str]]:
    """Return the rows of the summary table."""
    ids = ", ".join(map(str, report.layer_ids)) if report.layer_ids else "unknown"
    ids += " (assumed)" if report.are_layer_ids_assumed else ""
    rows = [
        ("samples", f"{report.num_samples:,}, format {report.format}"),
        ("tokens", f"{report.tokens.total:,}, {report.supervised_tokens.total:,} supervised"),
        ("verifier", report.verifier or "unknown"),
        ("aux layers", f"{report.num_aux_layers} (ids: {ids})"),
        ("hidden size", f"{report.hidden_size:,}, {', '.join(report.dtypes)}"),
        ("size", f"{format_bytes(report.num_bytes)}"),
        (
            "packed",
            f"{report.num_packed_sequences:,} sequences of {report.total_seq_len:,} tokens, "
            f"{report.fill:.1%} filled",
        ),
        (
            "time per epoch",
            f"{report.epoch_seconds:,.0f} s at {report.tokens_per_second:,.0f} tokens/s, "
            f"{format_bytes(int(report.disk_bytes_per_second))}/s from disk",
        ),
    ]
    if report.agreement is not None:
        rows.append(
            (
                "LM-head top-1 accuracy",
                f"{report.agreement.with_norm:.1%} with the final norm, "
                f"{report.agreement.without_norm:.1%} without, of "
                f"{report.agreement.num_positions:,} positions",
            )
        )
    return rows


def bins(counts: Distribution) -> tuple[list[str], Sequence[float]]:
    """Return the start and the count of each bin."""
    width = (counts.max - counts.min) / len(counts.histogram)
    starts = [counts.min + i * width for i in range(len(counts.histogram))]
    return [f"{start:,.0f}" for start in starts], counts.histogram


def plot(title: str, labels: Sequence[str], values: Sequence[float], unit: str) -> str:
    """Draw bars, each with its label below and its value above."""
    most = max(values, default=0) or 1
    step = (WIDTH - 2 * MARGIN) / max(len(values), 1)
    parts = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        height = value / most * (HEIGHT - 2 * MARGIN)
        left, top = MARGIN + i * step, HEIGHT - MARGIN - height
        middle = left + step / 2
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{step - 2:.1f}" '
            f'height="{height:.1f}"/>'
            f'<text x="{middle:.1f}" y="{top - 4:.1f}" text-anchor="middle">{show(value)}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(label)}</text>'
        )
    return (
        f"<figure><h2>{escape(title)} ({escape(unit)})</h2>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg></figure>\n'
    )


def escape(text: str) -> str:
    """Escape untrusted text for an element or an attribute, including hidden characters."""
    return escape_html(escape_line(text))


def show(value: float) -> str:
    """Format a number with three digits, or as an integer."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Build a table of names and values."""
    lines = [f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows]
    return f"<table>{''.join(lines)}</table>"


def problems(report: InspectionReport) -> str:
    """Build the table of problems, by file."""
    if not report.problems:
        return "<p>No problems found.</p>"
    lines = [
        f"<tr><td><code>{escape(str(p.file))}</code></td><td>{escape(p.problem)}</td></tr>"
        for p in report.problems[:MAX_NAMED]
    ]
    left = len(report.problems) - MAX_NAMED
    more = f"<p>and {left:,} more</p>" if left > 0 else ""
    return f"<h1>{len(report.problems):,} problems</h1><table>{''.join(lines)}</table>{more}"
