"""Converts a folder once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.convert_kill_points V0_FOLDER EVERY

Kill points are those of `kill_points`: changes on disk, and writes of samples at some of their
lengths. After each kill every v1 file is whole or absent and the source is as it was; the run that
follows ends in the very tree of the uninterrupted one.
"""

import json
import re
import sys
from pathlib import Path

from speculators_cli.core.preparation.conversion import convert_v0
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.convert_v0 import ConvertV0Settings
from tests.faults.whole_folder import try_points
from tests.run_files import tree

BEGUN = re.compile(r"open .*/\.tmp-(.+\.pt)\.\d+")


def main() -> None:
    """Try kill points and print what was found as JSON."""
    v0_dir, every = Path(sys.argv[1]), int(sys.argv[2])
    out_dir = v0_dir.with_name("v1")
    source = tree(v0_dir)
    files = {"v0_path": v0_dir, "output_dir": out_dir, "workers": 1}
    settings = ConvertV0Settings.model_validate({"files": files})
    report = try_points(
        lambda: convert_v0(settings, progress=SilentProgress()),
        out_dir,
        begun=BEGUN,
        is_unfinished=lambda name: ".tmp-" in name,
        find_damage=lambda: None if tree(v0_dir) == source else "the source differs",
        every=every,
    )
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
