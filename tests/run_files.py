"""What a test reads from the folder that a run has written."""

import json
from pathlib import Path
from typing import Any


def read_metrics(save_path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, those of one split if it is given."""
    lines = map(json.loads, (save_path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if split in (None, line["split"])]


def read_losses(save_path: Path) -> list[float]:
    """The loss of each line of `metrics.jsonl`."""
    return [line["loss"] for line in read_metrics(save_path)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
