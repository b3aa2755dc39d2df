"""What `--json` prints, as it is promised to scripts: keys are added, never renamed."""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Sizes of files depend on the version of torch that wrote them, times on the machine.
NOT_COMPARED = {"num_bytes", "disk_bytes_per_second", "duration_seconds"}


def assert_golden(report: dict[str, Any], name: str, folder: Path) -> None:
    """Compare a report with its golden file; `WRITE_GOLDEN=1` writes that file anew.

    Args:
        report: As it was printed.
        name: Of the golden file.
        folder: Written as FOLDER in it.
    """
    found = json.loads(json.dumps(report).replace(str(folder), "FOLDER"))
    file = FOLDER / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    expected = json.loads(file.read_text("utf-8"))
    assert list(found) == list(expected)
    for key in expected.keys() - NOT_COMPARED:
        assert rounded(found[key]) == rounded(expected[key]), key


def rounded(value: Any) -> Any:
    """Numbers to four digits: sums of float32 depend on their order by some last bits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value
