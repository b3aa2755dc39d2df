"""What work reports while it runs, kept for a test to read."""

from speculators_cli.core.progress import SilentProgress, StepReport


class RecordedProgress(SilentProgress):
    """Keeps facts, warnings with their hints, and log steps."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.hints: list[str | None] = []  # one for each warning
        self.steps: list[StepReport] = []

    def info(self, message: str) -> None:
        self.infos.append(message)

    def warn(self, message: str, *, hint: str | None = None) -> None:
        self.warnings.append(message)
        self.hints.append(hint)

    def trained(self, report: StepReport) -> None:
        self.steps.append(report)
