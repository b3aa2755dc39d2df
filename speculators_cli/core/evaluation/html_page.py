"""The page of `evaluate --html`: one file without scripts, and nothing loaded from elsewhere."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from speculators_cli.core.escaping import escape as escape_unsafe
from speculators_cli.core.evaluation.examples import Example, Marked
from speculators_cli.core.evaluation.report import EvaluationReport
from speculators_cli.core.files import replacing

WIDTH, HEIGHT, MARGIN = 560, 220, 36  # of a chart, in pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #888; }
pre { white-space: pre-wrap; background: #8881; padding: .8rem; border-radius: 4px; }
mark { background: #7d78; color: inherit; } .bar { fill: #3a7bd5; } .line { stroke: #3a7bd5; }
text { font: 12px system-ui, sans-serif; fill: currentColor; } .axis { stroke: #888; }
"""


def write_page(report: EvaluationReport, examples: Sequence[Example], file: Path) -> None:
    """Write the page, replacing the file.

    Raises:
        MachineError: The disk is full or fails.
    """
    with replacing(file) as temporary:
        temporary.write_text(build_page(report, examples), "utf-8")


def build_page(report: EvaluationReport, examples: Sequence[Example]) -> str:
    """Return the page."""
    found = report.measured
    parts = [
        f"<h1>{found.acceptance_length:.2f} tokens per verifier pass</h1>",
        _table(("", ""), _summary(report)),
        "<h2>Acceptance rate by position</h2>",
        _bars([(str(k), rate) for k, rate in enumerate(found.acceptance_rates, 1)], top=1.0),
        "<h2>Acceptance rate after accepted tokens</h2>",
        _bars(
            [(str(k), rate or 0.0) for k, rate in enumerate(found.conditional_acceptance_rates, 1)],
            top=1.0,
        ),
        "<h2>Predicted speedup by number of draft tokens</h2>",
        "<p>For one request at a time in this engine.</p>",
        _line(report.speedups.predicted),
    ]
    if report.categories:
        parts += [
            "<h2>Acceptance length by category</h2>",
            _bars([(x.name, x.acceptance_length) for x in report.categories]),
            _table(
                ("category", "prompts", "passes", "acceptance length", "95% interval"),
                [
                    (
                        x.name,
                        f"{x.num_prompts:,}",
                        f"{x.num_passes:,}",
                        f"{x.acceptance_length:.2f}",
                        _interval(x.interval),
                    )
                    for x in report.categories
                ],
            ),
        ]
    parts += [
        "<h2>Acceptance length by context length</h2>",
        _bars([(f"{x.min_tokens:,}+", x.acceptance_length) for x in report.context_lengths]),
        *_diagnosis(report),
        "<h2>Answers</h2>",
        "<p>Accepted draft tokens are marked; the verifier generated the rest. From the answer "
        "with the fewest accepted tokens to the one with the most.</p>",
        *(part for example in examples for part in _example(example)),
    ]
    title = f"Acceptance length of {_text(report.draft)}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        f"\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _summary(report: EvaluationReport) -> list[tuple[str, ...]]:
    found = report.measured
    rows: list[tuple[str, ...]] = [
        ("draft", report.draft),
        ("verifier", f"{report.verifier}, {report.dtype} on {report.device}"),
        ("prompts", f"{report.prompts}, {len(found.answers):,} answered"),
        ("sampling", f"temperature {report.temperature:g}, {report.max_new_tokens:,} new tokens"),
        ("draft tokens per pass", str(found.num_draft_tokens)),
        ("95% interval of the acceptance length", _interval(report.interval)),
        ("verifier passes", f"{found.num_passes:,}"),
        ("answers that differ from the verifier's own", f"{found.num_different:,}"),
    ]
    if report.refused_outside_vocab is not None:
        share = f"{report.refused_outside_vocab:.1%}"
        rows.append(("rejections outside the draft vocabulary", share))
    if report.against is not None:
        other = report.against
        rows.append(
            (
                "compared with",
                f"{other.draft}: {other.acceptance_length:.2f}, difference "
                f"{other.difference:+.2f}, interval {_interval(other.interval)}, {other.verdict}",
            )
        )
    return rows


def _diagnosis(report: EvaluationReport) -> list[str]:
    if report.diagnosis is None:
        return []
    rows = [
        (x.change, x.name, f"{x.acceptance_length:.2f}", f"{x.gain:+.2f}", _interval(x.interval))
        for x in report.diagnosis.causes
    ]
    return [
        "<h2>Changes that were tried</h2>",
        f"<p>Before any change {report.diagnosis.acceptance_length:.2f}, after every token of the "
        "answers.</p>",
        _table(("change", "may be wrong", "acceptance length", "gain", "95% interval"), rows),
    ]


def _example(example: Example) -> list[str]:
    category = "" if example.category is None else f", {_text(example.category)}"
    return [
        f"<h3>{example.acceptance_length:.2f} tokens per pass{category}</h3>",
        f"<pre>{_text(example.prompt)}</pre>",
        f"<pre>{_marked(example.answer)}</pre>",
    ]


def _marked(spans: Marked) -> str:
    return "".join(f"<mark>{_text(x)}</mark>" if marked else _text(x) for x, marked in spans)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns) if any(columns) else ""
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>" if head else f"<table>\n{body}\n</table>"


def _bars(values: Sequence[tuple[str, float]], *, top: float | None = None) -> str:
    """A bar chart."""
    highest = top or max((value for _, value in values), default=1.0) or 1.0
    step = (WIDTH - 2 * MARGIN) / max(len(values), 1)
    parts = []
    for index, (name, value) in enumerate(values):
        height = (HEIGHT - 2 * MARGIN) * value / highest
        left, y = MARGIN + index * step, HEIGHT - MARGIN - height
        middle = left + step / 2
        parts.append(
            f'<rect class="bar" x="{left + step * 0.15:.1f}" y="{y:.1f}" '
            f'width="{step * 0.7:.1f}" height="{height:.1f}"/>'
            f'<text x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{value:.2f}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">'
            f"{_text(name)}</text>"
        )
    return _chart(parts)


def _line(values: Sequence[float]) -> str:
    """A curve over 1, 2, ...; a thin line is at 1."""
    highest = max(1.0, *values)
    step = (WIDTH - 2 * MARGIN) / max(len(values), 1)

    def place(index: int, value: float) -> tuple[float, float]:
        return MARGIN + (index + 0.5) * step, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (
            value / highest
        )

    points = [place(index, value) for index, value in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    even = place(0, 1.0)[1]
    parts = [
        f'<line class="axis" x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{even:.1f}" y2="{even:.1f}" '
        'stroke-dasharray="3"/>',
        f'<polyline class="line" fill="none" stroke-width="2" points="{path}"/>',
    ]
    for index, ((x, y), value) in enumerate(zip(points, values, strict=True), start=1):
        parts.append(
            f'<circle class="bar" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{value:.2f}x</text>'
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{index}</text>'
        )
    return _chart(parts)


def _chart(parts: Sequence[str]) -> str:
    axis = (
        f'<line class="axis" x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{HEIGHT - MARGIN}" '
        f'y2="{HEIGHT - MARGIN}"/>'
    )
    body = "\n".join([axis, *parts])
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">\n{body}\n</svg>'


def _interval(interval: tuple[float, float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _text(text: str) -> str:
    """Text as HTML; invisible characters that reorder a line are shown."""
    return escape(escape_unsafe(text))
