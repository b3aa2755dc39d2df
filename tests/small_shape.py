"""Runs a script with a small model in place of the smallest shape that users choose.

python -m tests.small_shape SCRIPT ARGUMENTS
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

from speculators_cli.core.bench.shapes import SHAPES

NAME = "smollm2-135m"
VOCAB = 300


def main() -> None:
    """Run the script."""
    config, _ = SHAPES[NAME]
    config = replace(config, hidden_size=48, intermediate_size=80, num_layers=7)
    SHAPES[NAME] = (replace(config, num_heads=6, num_kv_heads=2, head_dim=8), VOCAB)
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
