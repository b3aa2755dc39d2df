"""`speculators env`."""

from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output
from speculators_cli.settings.base import Settings

EXAMPLES = (
    "speculators env",
    "speculators env --json",
)


@with_settings(Settings, examples=EXAMPLES)
def env(*, settings: Settings, output: Output) -> None:  # noqa: ARG001 - it has none
    """Report versions."""
    from speculators_cli.core.environment import describe_environment

    found = describe_environment()
    if output.is_json:
        output.result("env", {"versions": found})
        return
    width = max(map(len, found))
    for name, value in found.items():
        output.line(f"{name:<{width}}  {value or '-'}")
