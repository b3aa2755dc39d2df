"""metrics.jsonl: one JSON object a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.files import replacing
from speculators_cli.core.reading import opening, refusing


class JsonlLogger:
    """Appends a line at each call.

    Args:
        file: Cut back to the lines up to `resumed_step`, or started anew where that is None.
        resumed_step: The step a resumed run goes on from.

    Raises:
        SettingsError: What lies at `file` is no file, or may not be read.
    """

    def __init__(self, file: Path, resumed_step: int | None) -> None:
        kept = _read_lines(file, resumed_step) if resumed_step is not None else []
        with replacing(file) as temporary:
            temporary.write_text("".join(kept), "utf-8")
        self._stream = file.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, split: str, metrics: Mapping[str, float | None]) -> None:
        """Append the metrics of a step; what is not a number is null, since JSON has no NaN."""
        known = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in metrics.items()
        }
        self._stream.write(json.dumps({"step": step, "split": split, **known}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _read_lines(file: Path, last_step: int) -> list[str]:
    """Lines up to a step; a line that a kill has torn is left out."""
    if not file.exists():
        return []
    kept = []
    # One line at a time: it is as long as the run was. Bytes that are not UTF-8 make no JSON.
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
