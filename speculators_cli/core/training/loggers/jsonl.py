"""metrics.jsonl: one JSON object per line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import replacing
from speculators_cli.core.reading import opening, refusing


class JsonlLogger:
    """Appends one line per call.

    Args:
        file: Truncated to the lines up to `resumed_step`, or created anew if that is None.
        resumed_step: The step that the run is resumed from.

    Raises:
        SettingsError: `file` is not a regular file, or cannot be read.
    """

    def __init__(self, file: Path, resumed_step: int | None) -> None:
        kept = _read_lines(file, resumed_step) if resumed_step is not None else []
        with replacing(file) as temporary:
            temporary.write_text("".join(kept), "utf-8")
        self._stream = file.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Append the metrics of a step; non-finite values become null, since JSON has no NaN."""
        known = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in metrics.items()
        }
        self._stream.write(json.dumps({"step": step, "split": split, **known}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _read_lines(file: Path, last_step: int) -> list[str]:
    """Lines up to a step; a line truncated by a kill is skipped."""
    if not file.exists():
        return []
    kept = []
    # One line at a time: the file may be large. Bytes that are not UTF-8 are not valid JSON.
    with (
        refusing(SettingsError),
        opening(file) as descriptor,
        os.fdopen(descriptor, encoding="utf-8", errors="replace", closefd=False) as lines,
    ):
        for line in lines:
            try:
                is_kept = json.loads(line)["step"] <= last_step
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
            if is_kept:
                kept.append(line)
    return kept
