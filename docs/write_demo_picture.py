"""Run the demo and draw its output, into `docs/images/demo.svg`."""

import contextlib
import io
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from speculators_cli.cli.demo import show
from speculators_cli.cli.output import Output
from speculators_cli.core.demo.demo import check_report, run_demo
from speculators_cli.settings.demo import DemoRunSettings, DemoSettings

PICTURE = Path(__file__).resolve().parent / "images" / "demo.svg"
# The default format of Rich loads a font from the web.
FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; white-space: pre;
}}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class PictureOutput(Output):
    """Output without the path of the working folder, which is a temporary one."""

    def info(self, message: str) -> None:
        """Print a line of progress."""
        super().info(message.replace(f"{Path.cwd()}/", ""))


def main() -> None:
    """Run the demo in a temporary folder and write the picture."""
    output = PictureOutput()
    console = Console(
        record=True, width=124, file=io.StringIO(), highlight=False, markup=False, soft_wrap=True
    )
    output.stdout = output.stderr = console
    console.print("$ speculators demo")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        settings = DemoSettings(run=DemoRunSettings(output_dir=Path("speculators-demo")))
        report = run_demo(settings, progress=output)
    show(report, output)
    check_report(report)
    PICTURE.parent.mkdir(exist_ok=True)
    console.save_svg(
        str(PICTURE), title="speculators demo", theme=MONOKAI, code_format=FORMAT, unique_id="demo"
    )


if __name__ == "__main__":
    main()
