"""What the user sees: results on stdout, everything else on stderr; for people or as JSON."""

import json
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.escaping import escape, escape_line, escape_message
from speculators_cli.core.place import is_first_rank
from speculators_cli.core.progress import StepReport, Task, ValidationReport

SCHEMA_VERSION = 1
SECONDS_PER_LINE = 60  # of progress, without a terminal


class Output:
    """Speaks for a command; also the `Progress` of its core call.

    Args:
        is_json: The result is one JSON document.
        is_quiet: Only warnings and errors beside the result.
        is_verbose: Tracebacks in full.
    """

    def __init__(
        self, *, is_json: bool = False, is_quiet: bool = False, is_verbose: bool = False
    ) -> None:
        self.is_json = is_json
        self.is_quiet = is_quiet
        self.is_verbose = is_verbose
        self.stdout = Console(highlight=False, markup=False, soft_wrap=True)
        self.stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._live: Progress | None = None
        self._training: TaskID | None = None

    @property
    def is_live(self) -> bool:
        """Whether progress is drawn, not printed line by line."""
        return self.stderr.is_terminal and not self.stderr.is_dumb_terminal and not self.is_quiet

    def info(self, message: str) -> None:
        """Tell a fact worth a line."""
        if not self.is_quiet:
            self.stderr.print(escape_message(message))

    def warn(self, message: str, *, hint: str | None = None) -> None:
        """Tell of something that does not stop the work."""
        self.stderr.print(Text.assemble(("warning: ", "yellow"), escape_message(message)))
        if hint is not None:
            self.hint(hint)

    def hint(self, message: str) -> None:
        """Tell what to do next."""
        if not self.is_quiet:
            self.stderr.print(Text.assemble(("hint: ", "cyan"), escape_message(message)))

    def error(self, error: SpeculatorsError) -> None:
        """Tell what went wrong and what to do about it."""
        self.close()
        rank = _rank_prefix()
        self.stderr.print(Text.assemble(("error: ", "red"), rank, escape_message(error.message)))
        if error.hint is not None:
            self.stderr.print()
            self.stderr.print(Text.assemble(("hint: ", "cyan"), escape_message(error.hint)))
        if self.is_json:
            content = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
            self.stderr.print(json.dumps(content))

    def traceback(self) -> None:
        """Show where the error being handled came from."""
        self.close()
        self.stderr.print(escape(traceback.format_exc()), end="")

    def result(self, command: str, report: Mapping[str, Any]) -> None:
        """Write a report as the command's JSON document."""
        content = {"schema_version": SCHEMA_VERSION, "command": command, **report}
        self.stdout.print(json.dumps(content, indent=2))

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Write a summary of names and values."""
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name), Text(escape_line(value)))
        self.stdout.print(Panel(table, title=Text(escape_line(title)), title_align="left"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table; every column but the first holds numbers."""
        table = Table(box=SIMPLE_HEAD)
        for index, name in enumerate(columns):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in rows:
            table.add_row(*(Text(escape_line(cell)) for cell in row))
        self.stdout.print(table)

    def line(self, text: str = "") -> None:
        """Write a line of the result."""
        self.stdout.print(escape_line(text))

    def marked(self, parts: Sequence[tuple[str, bool]]) -> None:
        """Write text, some of its parts in colour and between guillemets."""
        pieces = (
            (f"«{escape(text)}»", "green") if is_marked else (escape(text), "")
            for text, is_marked in parts
        )
        self.stdout.print(Text.assemble(*pieces))

    @contextmanager
    def task(self, description: str, total: int, *, is_bytes: bool = False) -> Iterator[Task]:
        """Show a piece of work of `total` parts, where progress is drawn."""
        self.close()
        if not self.is_live:
            yield _LoggedTask(self, description, total)
            return
        count = _text("{task.completed:,}/{task.total:,}")
        done = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (count,)
        columns = (_text("{task.description}"), BarColumn(), *done, TimeRemainingColumn())
        with Progress(*columns, console=self.stderr, transient=True) as progress:
            yield _LiveTask(progress, progress.add_task(escape_line(description), total=total))

    def trained(self, report: StepReport) -> None:
        """Show a log step."""
        speed = format_speed(report.tokens_per_second)
        if not self.is_live:
            self.info(
                f"step {report.step}/{report.total_steps}  loss {_figure(report.loss, 3)}  "
                f"acceptance {_figure(report.acceptance_length, 2)}  lr {report.lr:.1e}  {speed}"
            )
            return
        if self._live is None:
            columns = (_text("{task.description}"), BarColumn(), _text("{task.fields[x]}"))
            self._live = Progress(*columns, console=self.stderr, transient=True)
            self._training = self._live.add_task("", total=report.total_steps, x="")
            self._live.start()
        assert self._training is not None, "made together with the live display"
        self._live.update(
            self._training,
            completed=report.step,
            description=f"epoch {report.epoch + 1}/{report.num_epochs}",
            x=f"{report.step:,}/{report.total_steps:,}  loss {_figure(report.loss, 3)}  "
            f"acceptance {_figure(report.acceptance_length, 2)}  {speed}  "
            f"{format_clock(report.seconds_left)} left",
        )

    def validated(self, report: ValidationReport) -> None:
        """Show the validation at the end of an epoch."""
        best = "  best so far" if report.is_best else ""
        figures = []
        if report.loss is not None:
            figures.append(f"loss {report.loss:.3f}")
            figures.append(f"acceptance length {_figure(report.acceptance_length, 2)}")
        if report.evaluated_acceptance_length is not None:
            figures.append(f"evaluated {report.evaluated_acceptance_length:.2f}")
        self.info(
            f"epoch {report.epoch + 1}/{report.num_epochs} validated: {'  '.join(figures)}{best}"
        )

    def close(self) -> None:
        """Take the live display away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _text(form: str) -> TextColumn:
    return TextColumn(form, markup=False)


class _LoggedTask:
    """Work without a terminal: a line per minute, none for short work."""

    def __init__(self, output: Output, description: str, total: int) -> None:
        self.output = output
        self.description = description
        self.total = total
        self.num_done = 0
        self.shown_at = time.monotonic()

    def advance(self, num_done: int = 1) -> None:
        self.num_done += num_done
        now = time.monotonic()
        if now - self.shown_at > SECONDS_PER_LINE:
            self.output.info(f"{self.description}: {self.num_done:,} of {self.total:,}")
            self.shown_at = now


class _LiveTask:
    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self.progress = progress
        self.task_id = task_id
        self.num_done = 0
        self.shown_at = 0.0

    def advance(self, num_done: int = 1) -> None:
        self.num_done += num_done
        now = time.monotonic()
        if now - self.shown_at > 0.1:
            self.progress.update(self.task_id, completed=self.num_done)
            self.shown_at = now


def _figure(value: float | None, num_digits: int) -> str:
    return "-" if value is None else f"{value:.{num_digits}f}"


def format_speed(tokens_per_second: float) -> str:
    """Such as `150k tokens/s`."""
    if tokens_per_second >= 10_000:
        return f"{tokens_per_second / 1000:.0f}k tokens/s"
    return f"{tokens_per_second:,.0f} tokens/s"


def format_clock(seconds: float) -> str:
    """Such as `0:05:39`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def format_duration(seconds: float) -> str:
    """Such as `14m 34s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{seconds:.1f}s"


def _rank_prefix() -> str:
    return "" if is_first_rank() else f"[rank {os.environ['RANK']}] "
