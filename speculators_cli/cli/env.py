"""`speculators env`."""

from typing import Any

from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output
from speculators_cli.settings.base import Settings


@with_settings(Settings)
def env(*, flags: dict[str, Any], output: Output) -> None:  # noqa: ARG001 - it has none
    """Show versions, for a bug report"""  # noqa: D415 - shown as help
    from speculators_cli.core.environment import describe_environment

    found = describe_environment()
    if output.is_json:
        output.result("env", {"versions": found})
        return
    width = max(map(len, found))
    for name, value in found.items():
        output.line(f"{name:<{width}}  {value or '-'}")
