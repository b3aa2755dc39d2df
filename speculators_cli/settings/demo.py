"""Every setting of `speculators demo`."""

from pathlib import Path

from pydantic import Field

from speculators_cli.settings.base import Settings
from speculators_cli.settings.train import Algorithm


class DemoRunSettings(Settings):
    """Where the demo writes, and its randomness."""

    algorithm: Algorithm = "eagle3"
    output_dir: Path = Field(
        Path("./speculators-demo"), description="Folder for samples, maps and checkpoints"
    )
    seed: int = Field(
        0, ge=0, description="Random seed for the draft's weights, sample order and noise"
    )


class DemoSettings(Settings):
    """All settings of the demo, in sections."""

    command = "demo"

    run: DemoRunSettings = Field(default_factory=DemoRunSettings, title="Run")
